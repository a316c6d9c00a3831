"""`attention_trace` on a GPU: `fused.attention_trace` around the kernels of `attention_moments`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ofa_kernels.fused import attention_trace as fused
from ofa_kernels.fused.attention_moments import Moments
from ofa_kernels.ops import attention_moments as operations


def attention_trace(*tensors: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """As `reference.attention_trace`, without a matrix of all scores; differentiable once."""
    return fused.attention_trace(*tensors, **settings, moments=_KERNELS)


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = operations.call(*inputs)
    return result


def _backward(*inputs: Any) -> tuple[Tensor | None, ...]:
    *grads, tangent = operations.call_backward(*inputs)
    # The operation has to return a tensor; without a tangent among the inputs it is empty.
    return *grads, None if inputs[7] is None else tangent


_KERNELS = Moments("kernels", _forward, _backward)
