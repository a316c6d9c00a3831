"""Norms by the norm kernel: those of tuned half-precision models, and those computed together with a residual sum.

A tuned norm takes 1 launch forward and 2 backward; Transformers' norms with a float32 scale take 7 and 12 for the same
result, rounded once. A norm of a fused layer (`fused_layers`) finds its result on the tensor that it is called with.

`fuse` replaces the module's class, as `fully_shard` does, not its `forward`: copies, pickles and the replicas of
`nn.DataParallel` then compute with their own scales.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ofa.anatomy.steps import Norm
from ofa_kernels import dispatch

_PLAIN = (Tensor, nn.Parameter)

TUNED, LAYERS = "tuned norms", "fused layers"
"""Who needs a norm fused."""

_USERS, _AHEAD = "_ofa_users", "_ofa_ahead"
"""Attributes of norms and of tensors."""


def fuse(module: nn.Module, norm: Norm, user: str) -> None:
    """Let a norm compute by the kernel or ahead where it can, and by its own forward pass otherwise.

    Does nothing to a norm whose forward pass was replaced (as accelerate's hooks do) or has a second input (a gate).

    Args:
        user: `TUNED` or `LAYERS`; the norm stays as it is here until `restore` was called for each user.
    """
    if not isinstance(module, FusedNorm):
        kind: Any = type(module)
        if "forward" in vars(module) or len(inspect.signature(kind.forward).parameters) != 2:
            return
        module.__class__ = _fused(kind, norm.kind, norm.offset, norm.eps)
    vars(module).setdefault(_USERS, set()).add(user)


def restore(module: nn.Module, user: str) -> None:
    """Restore the class that a norm had before `fuse`, unless another user needs it; no effect on other modules."""
    users = vars(module).get(_USERS, set())
    users.discard(user)
    kind = type(module)
    if not users and issubclass(kind, FusedNorm) and "own_class" in vars(kind):
        module.__class__ = kind.own_class
        vars(module).pop(_USERS, None)


@dataclass(frozen=True)
class Ahead:
    """The norm of a residual sum, computed with it: the rows, 1/σ of each, and what must not have changed since."""

    norm: nn.Module
    normalized: Tensor
    rstd: Tensor
    state: tuple[object, ...]


def remember(module: nn.Module, stream: Tensor, normalized: Tensor, rstd: Tensor) -> None:
    """Give a norm its result for a tensor, until the norm is called with it or the tensor is freed."""
    vars(stream)[_AHEAD] = Ahead(module, normalized, rstd, _state(module, stream))


def known(module: nn.Module, hidden: Tensor) -> Ahead | None:
    """The result that `remember` gave for this norm and tensor, if neither changed since."""
    if torch.compiler.is_compiling():
        return None
    ahead = vars(hidden).get(_AHEAD)
    if ahead is None or ahead.norm is not module or ahead.state != _state(module, hidden):
        return None
    return ahead


def _state(module: Any, hidden: Tensor) -> tuple[object, ...]:
    # A result without a graph is no result where one is wanted, as after reentrant checkpointing.
    return hidden._version, hidden.requires_grad, torch.is_grad_enabled(), id(module.weight), module.weight._version


def computes_ahead(module: nn.Module, stream: Tensor) -> bool:
    """Whether the norm of a residual sum like `stream` may be computed with the sum and given to the module."""
    if not isinstance(module, FusedNorm) or "forward" in vars(module):
        return False
    weight, bias = module.weight, _shift(module)
    return (
        # Other norms with a wider scale return the scale's dtype.
        (weight.dtype == stream.dtype or TUNED in vars(module).get(_USERS, ()))
        and weight.device == stream.device
        and all(type(tensor) in _PLAIN for tensor in (stream, weight, bias) if tensor is not None)
    )


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
        and TUNED in vars(module).get(_USERS, ())
        and "forward" not in vars(module)
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
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        return _blank, (self.own_class, *self.formula.values()), *reduced[2:]


@cache
def _fused(own: Any, kind: str, offset: float, eps: float) -> type[FusedNorm]:
    formula: dict[str, Any] = {"kind": kind, "offset": offset, "eps": eps}

    def forward(self: Any, hidden: Tensor) -> Tensor:
        """The norm of every row, (..., d) → (..., d)."""
        ahead = known(self, hidden)
        if ahead is not None:
            del vars(hidden)[_AHEAD]
            return ahead.normalized
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
