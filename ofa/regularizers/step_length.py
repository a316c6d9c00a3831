"""‖update‖² of each row, as an operation that passes the update through.

A separate operation would have a gradient of the update's size, to be added to the stream's; this adds both in one
sweep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofa_kernels import dispatch


def with_length(update: Tensor) -> tuple[Tensor, Tensor]:
    """The update, to use instead of the argument, and its squared length per row, float32 or wider."""
    narrow = update.dtype.itemsize < torch.float32.itemsize
    if torch.compiler.is_compiling() or narrow:
        return update, dispatch.squared_norm(update)
    passed, squared = _WithLength.apply(update)
    return passed, squared


class _WithLength(torch.autograd.Function):
    @staticmethod
    def forward(update: Tensor) -> tuple[Tensor, Tensor]:
        return update.view_as(update), dispatch.squared_norm(update)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, squared_grad: Tensor | None) -> Tensor | None:
        if squared_grad is None:
            return grad
        (update,) = ctx.saved_tensors
        twice = (2 * squared_grad).unsqueeze(-1)
        return update * twice if grad is None else torch.addcmul(grad, update, twice)
