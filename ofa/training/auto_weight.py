"""`sharpness="auto"`: a weight of the sharpness for every step, from the lengths of the two gradients.

A fixed weight is too much at the end: once the cross-entropy has nothing left to teach, Adam turns any gradient into
steps of full length. Here the term's gradient is always `SHARE` times as long as the loss's, and fades with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ofa.training.config import SHARE


class AutoWeight:
    """Adds the gradient of the sharpness to those of the parameters, at a share of their length.

    `sizes` are the units of parameters with relative steps; the others have the unit 1.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], sizes: Mapping[nn.Parameter, Tensor]) -> None:
        self._parameters, self._sizes = parameters, sizes
        self._sums: list[Tensor] = []

    def pull(self, sharpness: Tensor) -> None:
        """Add up the gradient of a micro-batch's share of the sharpness; its graph is kept for the loss."""
        found = torch.autograd.grad(sharpness, self._parameters, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if one is None else one for one, p in zip(found, self._parameters, strict=True)]
        self._sums = [a + b for a, b in zip(self._sums, parts, strict=True)] if self._sums else parts

    def add(self) -> float:
        """Add what was pulled to the gradients that the parameters have, and return its weight."""
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        length = self._length(self._sums)
        weight = SHARE * self._length(own) / length if length > 0 else 0.0
        for parameter, gradient, pulled in zip(self._parameters, own, self._sums, strict=True):
            parameter.grad = gradient + weight * pulled
        self._sums = []
        return weight

    def _length(self, gradients: Sequence[Tensor]) -> float:
        parts = [
            (gradient if (size := self._sizes.get(parameter)) is None else size * gradient).norm()
            for parameter, gradient in zip(self._parameters, gradients, strict=True)
        ]
        return float(torch.stack(parts).norm())
