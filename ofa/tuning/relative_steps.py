"""Optimizer steps in proportion to the pretrained scale: γ moves by |γ₀| times the step that the optimizer takes.

Adam gives every channel a step of about the learning rate, whatever its size. Scales of one model differ a
hundredfold (SmolLM2-135M: 0.03 in the first norm, 1.8 in the last), so one absolute step is nothing to some channels
and overwrites others. Relative steps are those of Adam on δ in γ = γ₀(1 + δ); Adafactor (arXiv 1804.04235) scales its
steps by the size of a parameter for the same reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ofa.errors import InputError
from ofa.tuning.norms import pretrained_scales

SMALLEST = 1e-3
"""Channels below this share of their norm's mean |γ₀| step as if they had it, so that a channel at 0 can move."""


def relative_steps(optimizer: torch.optim.Optimizer, model: nn.Module) -> RelativeSteps:
    """Make the steps of `optimizer` on the tuned norm scales of `model` relative: Δγ = |γ₀| · (the optimizer's step).

    Call it after `tune_norms` and after the optimizer is made; a second call replaces the first. Other parameters keep
    their steps. The learning rate is then a relative change per step: 1e-2 moves a channel by about 1 % of itself.

    Returns:
        The attached hooks; `remove()` takes them off.

    Raises:
        InputError: the norms of the model are not tuned, or the optimizer holds none of them.

    Example:
        >>> optimizer = torch.optim.AdamW(ofa.tune_norms(model), lr=1e-2)
        >>> steps = ofa.relative_steps(optimizer, model)
        >>> steps.remove()
    """
    sizes = {scale: _size(value) for scale, value in pretrained_scales(model).items()}
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if held.isdisjoint(sizes):
        raise InputError(
            "the optimizer holds none of the tuned norm scales: make it after tune_norms, of what that returns"
        )
    earlier = _latest.get(optimizer)
    if earlier is not None and not earlier.sizes.keys().isdisjoint(sizes):
        earlier.remove()
    _latest[optimizer] = RelativeSteps(optimizer, sizes)
    return _latest[optimizer]


class RelativeSteps:
    """Hooks on an optimizer that scale its steps; made by `relative_steps`."""

    def __init__(self, optimizer: torch.optim.Optimizer, sizes: Mapping[nn.Parameter, Tensor]) -> None:
        self.sizes = sizes
        """|γ₀| of every tuned scale."""
        self._before: list[Tensor] = []
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._scale),
        ]

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()

    def _remember(self, *_: object) -> None:
        self._before = [scale.detach().clone() for scale in self.sizes]

    @torch.no_grad()
    def _scale(self, *_: object) -> None:
        for before, (scale, size) in zip(self._before, self.sizes.items(), strict=True):
            scale.copy_(before + size * (scale - before))


_latest: WeakKeyDictionary[torch.optim.Optimizer, RelativeSteps] = WeakKeyDictionary()


def _size(pretrained: Tensor) -> Tensor:
    magnitude = pretrained.abs()
    return magnitude.clamp_min(SMALLEST * magnitude.mean())
