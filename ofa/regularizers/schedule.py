"""Measures the sharpness in one optimizer step of several, and uses its last gradient in between."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ofa.regularizers import objectives
from ofa.regularizers.objectives import Measurements


class Schedule:
    """Decides which passes measure the sharpness, and keeps the gradient for the others.

    Every step uses the last measured gradient, instead of one step in `every` using a multiple: spikes would distort
    Adam's second moment. With gradient accumulation, passes that do not measure use the mean of the measured ones.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._versions: list[int] | None = None
        self._step = -1
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}
        self._value: Tensor | None = None
        self._passes = 0

    def measures(self, weights: Sequence[Tensor]) -> bool:
        """Whether the pass that starts is measured; `weights` are the scales that an optimizer steps on."""
        if self._every == 1 or not torch.is_grad_enabled():
            return True
        versions = [weight._version for weight in weights]
        if versions != self._versions:
            self._versions, self._step = versions, self._step + 1
            if self._step % self._every == 0:
                self._sums, self._value, self._passes = {}, None, 0
        return self._step % self._every == 0 or self._value is None

    def complete(self, measured: Measurements, gradients: dict[int, list[tuple[Tensor, Tensor]]]) -> Measurements:
        """The measurements, with the gradient in γ of their sharpness, measured now or before."""
        if not torch.is_grad_enabled():
            return measured
        found = add_up(pair for index in sorted(gradients) for pair in gradients[index])
        if measured.sharpness is not None:
            if self._every > 1:
                self._add(found, measured.sharpness.detach())
            return replace(measured, sharpness=objectives.with_gradients(measured.sharpness, list(found.values())))
        held = self.held()
        return measured if held is None else replace(measured, sharpness=objectives.with_gradients(*held))

    def held(self) -> tuple[Tensor, list[tuple[Tensor, Tensor]]] | None:
        """The sharpness of passes between measured steps, and (scale, gradient) pairs; None before the first."""
        if self._value is None:
            return None
        return self._value / self._passes, [
            (weight, gradient / self._passes) for weight, gradient in self._sums.values()
        ]

    def resume(self, steps: int, value: Tensor, gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Continue after `steps` optimizer steps, with the value and gradients that `held` returned then."""
        self._step, self._versions = steps - 1, None
        self._value, self._sums, self._passes = value, add_up(gradients), 1

    def _add(self, found: dict[int, tuple[Tensor, Tensor]], value: Tensor) -> None:
        self._sums = add_up([*self._sums.values(), *found.values()])
        self._value = value if self._value is None else self._value + value
        self._passes += 1


def add_up(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[int, tuple[Tensor, Tensor]]:
    """(Tensor, gradient) by the tensor's id, with the gradients of a repeated tensor summed."""
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for weight, gradient in pairs:
        _, before = sums.get(id(weight), (weight, None))
        sums[id(weight)] = (weight, gradient if before is None else before + gradient)
    return sums
