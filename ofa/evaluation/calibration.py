"""Calibrate label probabilities: a temperature (arXiv 1706.04599), and contextual calibration (arXiv 2102.09690)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ofa.errors import InputError
from ofa.files import Json

CONTENT_FREE = ("N/A", "[MASK]", "-")
"""The paper has an empty text instead of the dash, but prompts here always have a text."""

_TEMPERATURES = torch.logspace(0, 1, 233, dtype=torch.float64)
"""From 1 to 10 in steps of 1 %. None below 1: a few held-out texts that happen to be right would ask for certainty."""


@dataclass(frozen=True)
class Calibration:
    """p(label | text) ∝ (p / prior)^(1 / temperature).

    `prior` holds the log-probabilities of the labels for texts without content, in the task's order, or nothing.
    `held_out` counts the examples that chose the temperature, and `folds` the runs that scored them, 0 for examples
    that no run was trained on.
    """

    temperature: float = 1.0
    prior: tuple[float, ...] = ()
    held_out: int = 0
    folds: int = 0

    def apply(self, log_probabilities: Tensor) -> Tensor:
        """Calibrated log-probabilities of (n, labels) log-probabilities."""
        prior = torch.tensor(self.prior) if self.prior else 0.0
        return ((log_probabilities - prior) / self.temperature).log_softmax(1)

    def to_dict(self) -> dict[str, object]:
        """The calibration as JSON values."""
        return {**asdict(self), "prior": list(self.prior)}


def calibration_from(details: Json, labels: Sequence[str]) -> Calibration | None:
    """The calibration in an adapter's `ofa_config.json`; None if it has none.

    Raises:
        InputError: it cannot be used.
    """
    saved = details.get("calibration")
    if saved is None:
        return None
    try:
        found = Calibration(**{**saved, "prior": tuple(map(float, saved["prior"]))})
        usable = found.temperature > 0 and len(found.prior) in (0, len(labels))
    except (TypeError, KeyError, ValueError):
        usable = False
    if not usable:
        raise InputError(f"the calibration {saved} of the adapter cannot be used; delete it from ofa_config.json")
    return found


def best_temperature(log_probabilities: Tensor, true: Tensor) -> float:
    """The temperature from 1 to 10 with the best likelihood of the true labels (n,), of (n, labels)."""
    scaled = (log_probabilities.double() / _TEMPERATURES[:, None, None]).log_softmax(2)
    losses = -scaled.gather(2, true.expand(len(_TEMPERATURES), -1)[..., None]).mean((1, 2))
    return round(float(_TEMPERATURES[losses.argmin()]), 4)
