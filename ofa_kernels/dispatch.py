"""Chooses the implementation of every operation, per call and by the tensors alone.

The Triton kernels take tensors on a GPU where Triton is installed; the reference takes all others.
`OFA_KERNELS=reference` in the environment leaves only the reference.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

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

P = ParamSpec("P")
R = TypeVar("R")

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation; `accepts` checks one of its tensors without a heavy import."""

    name: str
    function: Callable[..., Any]
    accepts: Callable[[Tensor], bool]


_IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {}
"""By operation, in the order in which they are tried; the last one is the reference."""


def choose(operation: str, *tensors: Tensor) -> Implementation:
    """The first implementation of `operation` that accepts all of these tensors, by device, dtype and shape."""
    offered = _IMPLEMENTATIONS[operation]
    if os.environ.get("OFA_KERNELS") == "reference":
        return offered[-1]
    return next(one for one in offered if all(one.accepts(tensor) for tensor in tensors))


def kernels_take(tensor: Tensor) -> bool:
    """Whether the Triton kernels accept a tensor; PyTorch calls AMD's GPUs "cuda" as well."""
    return (
        _HAS_TRITON
        and tensor.device.type == "cuda"
        and tensor.dtype in _KERNEL_DTYPES
        and tensor.dim() > 0
        and tensor.shape[-1] <= MAX_WIDTH
    )


def held_kernels_take(tensor: Tensor) -> bool:
    """Whether kernels without a derivative accept a tensor."""
    return not torch.is_grad_enabled() and kernels_take(tensor)


def _operation(
    specification: Callable[P, R], kernel: Callable[..., object], accepts: Callable[[Tensor], bool] = kernels_take
) -> Callable[P, R]:
    """A function with the specification's signature that calls the kernel where it accepts the first argument."""
    name, first = specification.__name__, next(iter(inspect.signature(specification).parameters))
    _IMPLEMENTATIONS[name] = (
        Implementation("triton", kernel, accepts),
        Implementation("reference", specification, lambda tensor: True),
    )

    @wraps(specification)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given: Any = args[0] if args else kwargs[first]
        tensors = (given,) if isinstance(given, Tensor) else given
        result: R = choose(name, *tensors).function(*args, **kwargs)
        return result

    return call


norm_step = _operation(reference.norm_step, norm_step_op.norm_step)
normalize = _operation(reference.normalize, norm_step_op.normalize)
squared_norm = _operation(reference.squared_norm, contract_op.squared_norm)
perturb = _operation(reference.perturb, perturb_op.perturb)
displace = _operation(reference.displace, displace_op.displace)
contract = _operation(reference.contract, contract_op.contract)
probed_diagonal = _operation(reference.probed_diagonal, probed_diagonal_op.probed_diagonal, held_kernels_take)
mlp_curvature = _operation(reference.mlp_curvature, mlp_curvature_op.mlp_curvature, held_kernels_take)
mlp_diagonal = _operation(reference.mlp_diagonal, branch_diagonal.mlp_diagonal, held_kernels_take)
attention_curvature = _operation(
    reference.attention_curvature, attention_curvature_op.attention_curvature, held_kernels_take
)
attention_trace = _operation(reference.attention_trace, branch_diagonal.attention_trace, held_kernels_take)
attention_diagonal = _operation(reference.attention_diagonal, branch_diagonal.attention_diagonal, held_kernels_take)

OPERATIONS = tuple(_IMPLEMENTATIONS)
