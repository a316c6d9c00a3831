"""Tuned norms of half-precision models by the norm kernel: 1 launch forward and 2 backward.

Transformers' norms with a float32 scale take 7 launches forward and 12 backward for the same result, rounded once.

`fuse` replaces the module's class, as `fully_shard` does, not its `forward`: copies, pickles and the replicas of
`nn.DataParallel` then compute with their own scales.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ofa.anatomy.steps import Norm
from ofa_kernels import dispatch

_PLAIN = (Tensor, nn.Parameter)


def fuse(module: nn.Module, norm: Norm) -> None:
    """Let a norm compute by the kernel where `takes` allows it, and by its own forward pass otherwise.

    Does nothing to a norm whose forward pass was replaced (as accelerate's hooks do) or has a second input (a gate).
    """
    kind: Any = type(module)
    if "forward" in vars(module) or len(inspect.signature(kind.forward).parameters) != 2:
        return
    module.__class__ = _fused(kind, norm.kind, norm.offset, norm.eps)


def restore(module: nn.Module) -> None:
    """Restore the class that a norm had before `fuse`; does nothing to any other module."""
    kind = type(module)
    if issubclass(kind, FusedNorm) and "own_class" in vars(kind):
        module.__class__ = kind.own_class


def takes(module: nn.Module, hidden: Tensor) -> bool:
    """Whether a norm called with `hidden`, (..., d), computes by the kernel.

    False for what the kernel has no rules for (dual numbers, functorch transforms, tracing, tensor subclasses such as
    DTensor) and for a replaced forward pass.
    """
    if not isinstance(module, FusedNorm) or dispatch.choose("normalize", hidden).name != "triton":
        return False
    weight, bias = module.weight, _shift(module)
    return (
        weight.dtype == torch.float32 != hidden.dtype
        and weight.device == hidden.device
        and all(type(tensor) in _PLAIN for tensor in (hidden, weight, bias) if tensor is not None)
        and "forward" not in module.__dict__
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
    )


class FusedNorm(nn.Module):
    """The base class that `fuse` adds before a norm's own class."""

    own_class: ClassVar[type[nn.Module]]
    formula: ClassVar[dict[str, Any]]
    """The keywords of `dispatch.normalize`."""
    weight: Tensor

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Name the norm's own class in copies and pickles: the class made by `fuse` cannot be imported."""
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        return _blank, (self.own_class, *self.formula.values()), *reduced[2:]


@cache
def _fused(own: Any, kind: str, offset: float, eps: float) -> type[FusedNorm]:
    formula: dict[str, Any] = {"kind": kind, "offset": offset, "eps": eps}

    def forward(self: Any, hidden: Tensor) -> Tensor:
        """The norm of every row, (..., d) → (..., d)."""
        if takes(self, hidden):
            return dispatch.normalize(hidden, self.weight, _shift(self), **formula)
        # Not super(): code that wrapped this forward pass may still call it after `restore`.
        result: Tensor = own.forward(self, hidden)
        return result

    # With the norm's own name: other libraries find norms by class name.
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (FusedNorm, own), {**names, "own_class": own, "formula": formula, "forward": forward})


def _shift(module: nn.Module) -> Tensor | None:
    return getattr(module, "bias", None)


def _blank(own: object, kind: str, offset: float, eps: float) -> FusedNorm:
    fused = _fused(own, kind, offset, eps)
    return fused.__new__(fused)
