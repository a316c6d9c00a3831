"""Calibrate an adapted model: a temperature from examples held out, a prior from texts without content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ofa.errors import InputError
from ofa.evaluation.calibration import CONTENT_FREE, Calibration, best_temperature
from ofa.evaluation.scorer import Scorer
from ofa.methods import Predictor
from ofa.tasks.task import Example, Task
from ofa.training.config import TrainingConfig

KINDS = ("fixed", "temperature", "context", "both", "none")
FIXED_TEMPERATURE = 1.5
"""For norm scales tuned by relative steps, which are too sure of themselves (docs/studies.md)."""

_FOLDS = 5


@dataclass(frozen=True)
class HeldOut:
    """Log-probabilities (n, labels) of examples that were not trained on.

    `priors` has those of texts without content by the same model, `true` the true labels' indices, and `folds` counts
    the models.
    """

    log_probabilities: Tensor
    priors: Tensor
    true: Tensor
    folds: int


def check_kind(kind: str, task: Task) -> None:
    """Refuse an unknown kind of calibration, and any for a task without labels."""
    if kind not in KINDS:
        raise InputError(f"there is no calibration {kind!r}; use one of {', '.join(KINDS)}")
    if task.open_ended and kind != "none":
        raise InputError(f"task {task.name!r} has no labels whose probabilities could be calibrated; leave it out")


def default_kind(scorer: Scorer, config: TrainingConfig) -> str:
    """Fixed for label words and relative steps, where it was measured."""
    return "fixed" if config.relative and scorer.mode in ("first token", "whole word") else "none"


def holds_out(kind: str) -> bool:
    """Whether the kind has a temperature that is chosen on examples held out."""
    return kind in ("temperature", "both")


def held_out_by_folds(fit: Callable[[Sequence[Example]], Predictor], task: Task, shots: Sequence[Example]) -> HeldOut:
    """Score every shot by a model that was trained on the other folds; each fold has examples of every class.

    Raises:
        InputError: a class has one shot only.
    """
    places = _places(task, shots)
    folds = min(_FOLDS, min(sum(shot.label == label for shot in shots) for label in task.labels))
    if folds < 2:
        raise InputError(
            "a temperature needs examples to hold out, and a class has one shot only; give more shots or examples for "
            "validation"
        )
    parts = []
    for fold in range(folds):
        left = [shot for shot, place in zip(shots, places, strict=True) if place % folds == fold]
        with fit([shot for shot, place in zip(shots, places, strict=True) if place % folds != fold]) as predictor:
            parts.append(held_out_by_validation(predictor.scorer, left))
    scores, priors, true = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("log_probabilities", "priors", "true")
    )
    return HeldOut(scores, priors, true, folds)


def held_out_by_validation(scorer: Scorer, examples: Sequence[Example]) -> HeldOut:
    """Score examples that the model was not trained on."""
    scores = scorer.log_probabilities([example.text for example in examples])
    true = torch.tensor([scorer.task.labels.index(example.label) for example in examples])
    return HeldOut(scores, _prior(scorer).expand_as(scores), true, 0)


def calibration(scorer: Scorer, kind: str, held_out: HeldOut | None) -> Calibration | None:
    """The calibration of a model, with a temperature where examples were held out; None for the kind "none"."""
    if kind == "none":
        return None
    if kind == "fixed":
        return Calibration(FIXED_TEMPERATURE)
    prior = () if kind == "temperature" else tuple(_prior(scorer).tolist())
    if held_out is None or not holds_out(kind):
        return Calibration(prior=prior)
    relative = held_out.log_probabilities - (held_out.priors if prior else 0.0)
    temperature = best_temperature(relative, held_out.true)
    return Calibration(temperature, prior, len(held_out.true), held_out.folds)


def _places(task: Task, shots: Sequence[Example]) -> list[int]:
    """The number of each shot among those of its class."""
    numbers = {label: count() for label in task.labels}
    return [next(numbers[shot.label]) for shot in shots]


def _prior(scorer: Any) -> Tensor:
    """The mean of the labels' probabilities for texts without content, as logarithms."""
    return scorer.log_probabilities(CONTENT_FREE).exp().mean(0).log()
