"""Chooses the implementation of every operation, per call and by the tensors alone.

The Triton kernels take tensors on a GPU where Triton is installed; the reference takes all others. `register` adds an
implementation before them. `OFA_KERNELS=reference` in the environment leaves only the reference.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from ofa_kernels import reference
from ofa_kernels.launch import MAX_WIDTH
from ofa_kernels.ops import attention_curvature as attention_curvature_op
from ofa_kernels.ops import branch_diagonal
from ofa_kernels.ops import contract as contract_op
from ofa_kernels.ops import displace as displace_op
from ofa_kernels.ops import mlp_curvature as mlp_curvature_op
from ofa_kernels.ops import norm_step as norm_step_op
from ofa_kernels.ops import perturb as perturb_op
from ofa_kernels.ops import probed_diagonal as probed_diagonal_op

OPERATIONS = (
    "norm_step",
    "normalize",
    "squared_norm",
    "perturb",
    "displace",
    "contract",
    "probed_diagonal",
    "rstd",
    "mlp_curvature",
    "mlp_slopes",
    "mlp_diagonal",
    "attention_curvature",
    "attention_adjoint",
    "attention_trace",
    "attention_diagonal",
)

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation; `accepts` checks one of its tensors without a heavy import."""

    name: str
    function: Callable[..., Any]
    accepts: Callable[[Tensor], bool]


P = ParamSpec("P")
R = TypeVar("R")


def _as_specified(specification: Callable[P, R]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Give a function that passes its arguments on the signature of their specification."""

    def mark(function: Callable[..., R]) -> Callable[P, R]:
        function.__signature__ = inspect.signature(specification)  # type: ignore[attr-defined]
        return cast("Callable[P, R]", function)

    return mark


def register(operation: str, implementation: Implementation) -> None:
    """Add an implementation, tried before those registered earlier.

    Raises:
        KeyError: there is no such operation.
    """
    _IMPLEMENTATIONS[operation].insert(0, implementation)


def offered(operation: str) -> tuple[Implementation, ...]:
    """All implementations of an operation, in the order in which they are tried.

    Raises:
        KeyError: there is no such operation.
    """
    return tuple(_IMPLEMENTATIONS[operation])


def choose(operation: str, *tensors: Tensor) -> Implementation:
    """The first implementation of `operation` that accepts all of these tensors, by device, dtype and shape."""
    offered = _IMPLEMENTATIONS[operation]
    if os.environ.get("OFA_KERNELS") == "reference":
        return offered[-1]
    return next(one for one in offered if all(one.accepts(tensor) for tensor in tensors))


@_as_specified(reference.norm_step)
def norm_step(residual: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual addition, norm and squared update per row; see `reference.norm_step`.

    Example:
        >>> stream, update, scale = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.ones(8)
        >>> stream, normalized, sqnorm, rstd = ofa_kernels.norm_step(stream, update, scale, eps=1e-6)
        >>> torch.testing.assert_close(sqnorm, update.square().sum(-1))
        >>> torch.testing.assert_close(normalized, stream * rstd[..., None])
    """
    return choose("norm_step", residual).function(residual, *args, **kwargs)


@_as_specified(reference.normalize)
def normalize(stream: Tensor, *args: object, **kwargs: object) -> Tensor:
    """The norm of each row; see `reference.normalize`."""
    return choose("normalize", stream).function(stream, *args, **kwargs)


def squared_norm(update: Tensor) -> Tensor:
    """Squared length of each row; see `reference.squared_norm`."""
    return choose("squared_norm", update).function(update)


@_as_specified(reference.perturb)
def perturb(stream: Tensor, *args: object, **kwargs: object) -> Tensor:
    """Normalized copies moved along preconditioned probes; see `reference.perturb`.

    Example:
        >>> stream, scale = torch.randn(2, 5, 8), torch.ones(8)
        >>> ofa_kernels.perturb(stream, scale, eps=1e-6, samples=3, epsilon=1e-2, seed=0).shape
        torch.Size([3, 2, 5, 8])
    """
    return choose("perturb", stream).function(stream, *args, **kwargs)


@_as_specified(reference.displace)
def displace(stream: Tensor, *args: object, **kwargs: object) -> Tensor:
    """Copies moved along preconditioned probes; see `reference.displace`."""
    return choose("displace", stream).function(stream, *args, **kwargs)


@_as_specified(reference.contract)
def contract(base: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    """Dot product of each probe with the change it caused, per row, and ‖base‖²; see `reference.contract`.

    Example:
        >>> base = torch.randn(5, 8)
        >>> copies = torch.stack([base, 2 * base])
        >>> products, sqnorm = ofa_kernels.contract(base, copies, seed=0)
        >>> products.shape, products[0].abs().max()  # a copy that did not move has none
        (torch.Size([2, 5]), tensor(0.))
    """
    return choose("contract", base).function(base, *args, **kwargs)


@_as_specified(reference.probed_diagonal)
def probed_diagonal(base: Tensor, *args: object, **kwargs: object) -> Tensor:
    """Diagonal of a summed Jacobian from probes; see `reference.probed_diagonal`."""
    return choose("probed_diagonal", base).function(base, *args, **kwargs)


@_as_specified(reference.rstd)
def rstd(stream: Tensor, **kwargs: object) -> Tensor:
    """1/σ of each row; see `reference.rstd`."""
    return choose("rstd", stream).function(stream, **kwargs)


@_as_specified(reference.mlp_curvature)
def mlp_curvature(gate: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Token sums of an MLP's slopes; see `reference.mlp_curvature`.

    Example:
        >>> gate, up, weights = torch.randn(1, 5, 16), torch.randn(1, 5, 16), torch.full((1, 5), 0.2)
        >>> gate_sums, up_sums, moved = ofa_kernels.mlp_curvature(gate, up, weights, activation="silu")
        >>> torch.testing.assert_close(up_sums, 0.2 * torch.nn.functional.silu(gate).sum(1))
        >>> gate_sums.shape, moved
        (torch.Size([1, 16]), None)
    """
    return choose("mlp_curvature", gate).function(gate, *args, **kwargs)


@_as_specified(reference.mlp_slopes)
def mlp_slopes(gate: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
    """An MLP's slopes token by token; see `reference.mlp_slopes`."""
    return choose("mlp_slopes", gate).function(gate, *args, **kwargs)


@_as_specified(reference.mlp_diagonal)
def mlp_diagonal(weights: Sequence[Tensor], *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
    """Diagonal of an MLP's summed Jacobian, from one read of its weights; see `reference.mlp_diagonal`.

    Example:
        >>> weight, down, sums = torch.randn(16, 8), torch.randn(8, 16), torch.randn(1, 16)
        >>> diagonal, _ = ofa_kernels.mlp_diagonal([weight], down, [sums])
        >>> torch.testing.assert_close(diagonal[0], (down @ torch.diag(sums[0]) @ weight).diagonal())
    """
    return choose("mlp_diagonal", *weights).function(weights, *args, **kwargs)


@_as_specified(reference.attention_curvature)
def attention_curvature(query: Tensor, *args: object, **kwargs: object) -> reference.AttentionSums:
    """Token sums of an attention's Jacobian between its projections; see `reference.attention_curvature`.

    Example:
        >>> query, key, value = torch.randn(3, 1, 2, 5, 4)  # one sequence, two heads, five tokens
        >>> attends = ofa_kernels.reference.Attends(scale=0.5, causal=True)
        >>> output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5)
        >>> sums = ofa_kernels.attention_curvature(query, key, value, output, torch.full((1, 5), 0.2), attends)
        >>> sums.query.shape, sums.key.shape, sums.value.shape
        (torch.Size([1, 2, 4, 4]), torch.Size([1, 2, 4, 4]), torch.Size([1, 2]))
    """
    return choose("attention_curvature", query).function(query, *args, **kwargs)


@_as_specified(reference.attention_adjoint)
def attention_adjoint(query: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor, Tensor]:
    """An attention's own-token backward pass; see `reference.attention_adjoint`."""
    return choose("attention_adjoint", query).function(query, *args, **kwargs)


@_as_specified(reference.attention_trace)
def attention_trace(query: Tensor, *args: object, **kwargs: object) -> Tensor:
    """Trace of an attention's summed Jacobian, from its weights; see `reference.attention_trace`.

    Example:
        >>> query, key, value = torch.randn(3, 1, 2, 5, 4)  # one sequence, two heads, five tokens
        >>> attends = ofa_kernels.reference.Attends(scale=0.5, causal=True)
        >>> output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5)
        >>> sums = ofa_kernels.attention_curvature(query, key, value, output, torch.full((1, 5), 0.2), attends)
        >>> inputs, outputs = torch.randn(2, 4, 8), torch.randn(2, 8, 4)  # projections of both heads, width 8
        >>> ofa_kernels.attention_trace(inputs, inputs, inputs, outputs, sums[:3], torch.ones(8)).shape
        torch.Size([1])
    """
    return choose("attention_trace", query).function(query, *args, **kwargs)


@_as_specified(reference.attention_diagonal)
def attention_diagonal(query: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
    """Diagonal of an attention's summed Jacobian, from its weights; see `reference.attention_diagonal`.

    Example:
        >>> query, key, value = torch.randn(3, 1, 2, 5, 4)  # one sequence, two heads, five tokens
        >>> attends = ofa_kernels.reference.Attends(scale=0.5, causal=True)
        >>> output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5)
        >>> sums = ofa_kernels.attention_curvature(query, key, value, output, torch.full((1, 5), 0.2), attends)
        >>> inputs, outputs = torch.randn(2, 4, 8), torch.randn(2, 8, 4)  # projections of both heads, width 8
        >>> of_one = tuple(part[0] for part in sums[:3])
        >>> diagonal, _ = ofa_kernels.attention_diagonal(inputs, inputs, inputs, outputs, of_one)
        >>> trace = ofa_kernels.attention_trace(inputs, inputs, inputs, outputs, sums[:3], torch.ones(8))
        >>> torch.testing.assert_close(diagonal.sum(), trace[0], rtol=1e-4, atol=1e-5)
    """
    return choose("attention_diagonal", query).function(query, *args, **kwargs)


_IMPLEMENTATIONS = {
    operation: [Implementation("reference", getattr(reference, operation), lambda tensor: True)]
    for operation in OPERATIONS
}


def _kernels_take(tensor: Tensor) -> bool:
    """Whether the Triton kernels accept a tensor; PyTorch calls AMD's GPUs "cuda" as well."""
    return (
        _HAS_TRITON
        and tensor.device.type == "cuda"
        and tensor.dtype in _KERNEL_DTYPES
        and tensor.dim() > 0
        and tensor.shape[-1] <= MAX_WIDTH
    )


_KERNELS: dict[str, Callable[..., object]] = {
    "norm_step": norm_step_op.norm_step,
    "normalize": norm_step_op.normalize,
    "squared_norm": contract_op.squared_norm,
    "perturb": perturb_op.perturb,
    "displace": displace_op.displace,
    "contract": contract_op.contract,
}
for _operation, _function in _KERNELS.items():
    register(_operation, Implementation("triton", _function, _kernels_take))


def _held(tensor: Tensor) -> bool:
    """Whether kernels without a derivative accept a tensor."""
    return not torch.is_grad_enabled() and _kernels_take(tensor)


_HELD_KERNELS: dict[str, Callable[..., object]] = {
    "probed_diagonal": probed_diagonal_op.probed_diagonal,
    "mlp_curvature": mlp_curvature_op.mlp_curvature,
    "mlp_diagonal": branch_diagonal.mlp_diagonal,
    "attention_curvature": attention_curvature_op.attention_curvature,
    "attention_trace": branch_diagonal.attention_trace,
    "attention_diagonal": branch_diagonal.attention_diagonal,
}
for _operation, _function in _HELD_KERNELS.items():
    register(_operation, Implementation("triton", _function, _held))
