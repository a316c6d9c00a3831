"""Tuned norms of half-precision models in one launch: a class for a norm, whose forward pass is the norm step's kernel.

A norm with a float32 scale computes in float32 whatever it is given. Transformers' norms do that in seven launches
forward and a dozen backward, which the kernels do in one and two, with the same one rounding at the end.

It is the class of a module that is exchanged, as `fully_shard` does: copies, pickles and the replicas of
`nn.DataParallel` then compute with their own scales, which a `forward` bound to one module would not.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ofa.anatomy.steps import Norm
from ofa_kernels import dispatch

_PLAIN = (Tensor, nn.Parameter)


def fuse(module: nn.Module, norm: Norm) -> None:
    """Let a norm compute by the kernel whatever `takes` says of a tensor, and by its own forward pass anything else.

    A norm is left as it is whose forward pass was exchanged before, as accelerate's hooks do, or reads more than the
    stream, such as a gate.
    """
    kind: Any = type(module)
    if "forward" in vars(module) or len(inspect.signature(kind.forward).parameters) != 2:
        return
    module.__class__ = _fused(kind, norm.kind, norm.offset, norm.eps)


def restore(module: nn.Module) -> None:
    """Give back the class that a norm had before `fuse`; does nothing to any other module."""
    kind = type(module)
    if issubclass(kind, FusedNorm) and "own_class" in vars(kind):
        module.__class__ = kind.own_class


def takes(module: nn.Module, hidden: Tensor) -> bool:
    """Whether a norm called with `hidden`, (..., d), computes it by the kernel.

    Not where somebody else looks at what the norm does: dual numbers and functorch's transforms, which the kernel has
    no rules for; tensors that are more than plain ones, such as FSDP2's parts; a forward pass that was exchanged.
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
    """What `fuse` puts in front of a norm's own class."""

    own_class: ClassVar[type[nn.Module]]
    formula: ClassVar[dict[str, Any]]
    """The keywords of `dispatch.normalize`."""
    weight: Tensor

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the norm's own class, since this one has no name to be found by."""
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return _blank, (self.own_class, *self.formula.values()), *reduced[2:]


@cache
def _fused(own: Any, kind: str, offset: float, eps: float) -> type[FusedNorm]:
    formula: dict[str, Any] = {"kind": kind, "offset": offset, "eps": eps}

    def forward(self: Any, hidden: Tensor) -> Tensor:
        """The norm of every row, (..., d) → (..., d)."""
        if takes(self, hidden):
            return dispatch.normalize(hidden, self.weight, _shift(self), **formula)
        # Not by super(): who has exchanged the forward pass may call this one behind `restore`.
        result: Tensor = own.forward(self, hidden)
        return result

    # By its own name, which others know norms by.
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (FusedNorm, own), {**names, "own_class": own, "formula": formula, "forward": forward})


def _shift(module: nn.Module) -> Tensor | None:
    return getattr(module, "bias", None)


def _blank(own: Any, kind: str, offset: float, eps: float) -> FusedNorm:
    fused = _fused(own, kind, offset, eps)
    return fused.__new__(fused)
