"""The one place that decides which implementation of an operation runs.

The choice is made per call and from the tensors alone, so that one process may use several devices. An implementation
is offered with `register`; the reference accepts everything and is asked last. The Triton kernels take tensors on a
GPU where Triton is installed. `OFA_KERNELS=reference` in the environment leaves only the reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ofa_kernels import reference
from ofa_kernels.blocked import attention_trace as blocked_attention_trace
from ofa_kernels.fused import attention_moments as fused_attention_moments
from ofa_kernels.fused import attention_trace as fused_attention_trace
from ofa_kernels.fused import mlp_trace as fused_mlp_trace
from ofa_kernels.fused import norm_trace as fused_norm_trace
from ofa_kernels.fused import squared_norm as fused_squared_norm
from ofa_kernels.launch import MAX_WIDTH, WIDEST_WEIGHTS, widest_head
from ofa_kernels.ops import attention_moments as attention_moments_op
from ofa_kernels.ops import attention_trace as attention_trace_op
from ofa_kernels.ops import constants as constants_op
from ofa_kernels.ops import contract as contract_op
from ofa_kernels.ops import displace as displace_op
from ofa_kernels.ops import mlp_trace as mlp_trace_op
from ofa_kernels.ops import norm_step as norm_step_op
from ofa_kernels.ops import norm_trace as norm_trace_op
from ofa_kernels.ops import perturb as perturb_op
from ofa_kernels.ops import step_boundary as step_boundary_op

OPERATIONS = (
    "norm_step",
    "normalize",
    "squared_norm",
    "perturb",
    "displace",
    "contract",
    "step_boundary",
    "rstd",
    "mlp_trace",
    "attention_trace",
    "attention_moments",
    "norm_trace",
    "mlp_constants",
    "mlp_constants_gradient",
    "attention_constants",
    "attention_constants_gradient",
)

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation; `accepts` looks at one of its tensors and imports nothing heavy."""

    name: str
    function: Callable[..., Any]
    accepts: Callable[[Tensor], bool]


def register(operation: str, implementation: Implementation) -> None:
    """Offer an implementation, asked before those registered earlier.

    Raises:
        KeyError: there is no such operation.
    """
    _IMPLEMENTATIONS[operation].insert(0, implementation)


def offered(operation: str) -> tuple[Implementation, ...]:
    """All implementations of an operation, in the order in which they are asked.

    Raises:
        KeyError: there is no such operation.
    """
    return tuple(_IMPLEMENTATIONS[operation])


def choose(operation: str, *tensors: Tensor) -> Implementation:
    """The implementation of `operation` that runs for tensors of this device, dtype and shape: it accepts them all."""
    offered = _IMPLEMENTATIONS[operation]
    if os.environ.get("OFA_KERNELS") == "reference":
        return offered[-1]
    return next(one for one in offered if all(one.accepts(tensor) for tensor in tensors))


def norm_step(residual: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual addition, norm and squared update per row; see `reference.norm_step`."""
    return choose("norm_step", residual).function(residual, *args, **kwargs)


def normalize(stream: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The norm of each row and nothing else; see `reference.normalize`."""
    return choose("normalize", stream).function(stream, *args, **kwargs)


def squared_norm(update: Tensor) -> Tensor:
    """Squared length of each row; see `reference.squared_norm`."""
    return choose("squared_norm", update).function(update)


def perturb(stream: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Normalized copies moved along preconditioned probes; see `reference.perturb`."""
    return choose("perturb", stream).function(stream, *args, **kwargs)


def displace(stream: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Copies moved along preconditioned probes; see `reference.displace`."""
    return choose("displace", stream).function(stream, *args, **kwargs)


def contract(base: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Probes against what they changed, per row, and ‖base‖²; see `reference.contract`."""
    return choose("contract", base).function(base, *args, **kwargs)


def step_boundary(residual: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The end of a measured step and the beginning of the next; see `reference.step_boundary`."""
    return choose("step_boundary", residual).function(residual, *args, **kwargs)


def rstd(stream: Tensor, **kwargs: Any) -> Tensor:
    """1/σ of each row; see `reference.rstd`."""
    return choose("rstd", stream).function(stream, **kwargs)


def mlp_trace(gate: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Activation of an MLP, its change along its input, and its share of a trace; see `reference.mlp_trace`."""
    return choose("mlp_trace", gate).function(gate, *args, **kwargs)


def attention_trace(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """How attention changes along its own token, and its share of a trace; see `reference.attention_trace`."""
    return choose("attention_trace", query).function(query, *args, **kwargs)


def attention_moments(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, mean and covariance that the trace of attention is made of; see `reference.attention_moments`."""
    return choose("attention_moments", query).function(query, *args, **kwargs)


def norm_trace(stream: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The trace of a branch behind its norm; see `reference.norm_trace`."""
    return choose("norm_trace", stream).function(stream, *args, **kwargs)


def mlp_constants(gate: Tensor, up: Tensor | None, down: Tensor, scale: Tensor, centred: bool) -> tuple[Tensor, ...]:
    """(W G W_d)_kk of an MLP's weights; see `reference.mlp_constants`."""
    chosen = choose("mlp_constants", *_given(gate, up, down, scale))
    return chosen.function(gate, up, down, scale, centred)


def mlp_constants_gradient(
    gate: Tensor, up: Tensor | None, down: Tensor, scale: Tensor, grads: Sequence[Tensor], centred: bool
) -> Tensor:
    """Its gradient in γ; see `reference.mlp_constants_gradient`."""
    chosen = choose("mlp_constants_gradient", *_given(gate, up, down, scale))
    return chosen.function(gate, up, down, scale, grads, centred)


def attention_constants(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: Tensor, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """W_q G W_o, W_k G W_o and tr(W_v G W_o) of every head; see `reference.attention_constants`."""
    chosen = choose("attention_constants", output, query, key, value, scale)
    return chosen.function(query, key, value, output, scale, centred)


def attention_constants_gradient(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: Tensor, grads: Sequence[Tensor], centred: bool
) -> Tensor:
    """Its gradient in γ; see `reference.attention_constants_gradient`."""
    chosen = choose("attention_constants_gradient", output, query, key, value, scale)
    return chosen.function(query, key, value, output, scale, grads, centred)


def _given(*tensors: Tensor | None) -> Iterator[Tensor]:
    return (tensor for tensor in tensors if tensor is not None)


_IMPLEMENTATIONS = {
    operation: [Implementation("reference", getattr(reference, operation), lambda tensor: True)]
    for operation in OPERATIONS
}


def _kernels_take(tensor: Tensor) -> bool:
    """Whether the Triton kernels can work on this tensor; AMD's GPUs are "cuda" to PyTorch as well."""
    return (
        _HAS_TRITON
        and tensor.device.type == "cuda"
        and tensor.dtype in _KERNEL_DTYPES
        and tensor.dim() > 0
        and tensor.shape[-1] <= MAX_WIDTH
    )


_FUSED: dict[str, Callable[..., Any]] = {
    "mlp_trace": fused_mlp_trace.mlp_trace,
    "attention_trace": fused_attention_trace.attention_trace,
    "attention_moments": fused_attention_moments.attention_moments,
    "norm_trace": fused_norm_trace.norm_trace,
    "squared_norm": fused_squared_norm.squared_norm,
}
for _operation, _function in _FUSED.items():
    register(_operation, Implementation("fused", _function, lambda tensor: True))


def _blocks_take(query: Tensor) -> bool:
    """Whether to work on a few queries at a time, for the caches of a CPU.

    Not inside of `torch.compile`: Inductor 2.13 gives a buffer of these gradients away before it was read for the last
    time (it is right with `inplace_buffers=False`), and blocks its loops for the caches itself.
    """
    return query.device.type == "cpu" and not torch.compiler.is_compiling()


register("attention_trace", Implementation("blocked", blocked_attention_trace.attention_trace, _blocks_take))

_KERNELS: dict[str, Callable[..., Any]] = {
    "norm_step": norm_step_op.norm_step,
    "normalize": norm_step_op.normalize,
    "squared_norm": contract_op.squared_norm,
    "perturb": perturb_op.perturb,
    "displace": displace_op.displace,
    "contract": contract_op.contract,
    "step_boundary": step_boundary_op.step_boundary,
    "mlp_trace": mlp_trace_op.mlp_trace,
    "norm_trace": norm_trace_op.norm_trace,
    "mlp_constants": constants_op.mlp_constants,
    "mlp_constants_gradient": constants_op.mlp_constants_gradient,
}
for _operation, _function in _KERNELS.items():
    register(_operation, Implementation("triton", _function, _kernels_take))


def _attention_kernels_take(query: Tensor) -> bool:
    """Whether the attention kernels can work on these heads; values and features are hardly ever wider."""
    return _kernels_take(query) and query.dim() == 4 and query.shape[-1] <= widest_head(query.element_size())


register(
    "attention_moments",
    Implementation("triton", attention_moments_op.attention_moments, _attention_kernels_take),
)
register(
    "attention_trace",
    Implementation("triton", attention_trace_op.attention_trace, _attention_kernels_take),
)


def _constants_kernels_take(tensor: Tensor) -> bool:
    """Whether the kernels can work on weights of these heads, or on a norm's scale.

    Weights are (heads, channels of a head, channels of the stream) or the other way round; a head is the narrower one.
    """
    heads = tensor.dim() >= 3 and min(tensor.shape[-2:]) <= WIDEST_WEIGHTS
    return _kernels_take(tensor) and (heads or tensor.dim() == 1)


_KERNELS_OF_HEADS: dict[str, Callable[..., Any]] = {
    "attention_constants": constants_op.attention_constants,
    "attention_constants_gradient": constants_op.attention_constants_gradient,
}
for _operation, _function in _KERNELS_OF_HEADS.items():
    register(_operation, Implementation("triton", _function, _constants_kernels_take))
