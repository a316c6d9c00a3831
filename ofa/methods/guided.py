"""Structured gradient guidance of norm tuning: exact, or of first order (docs/theory.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder
from ofa.methods import Predictor
from ofa.methods.norm_tuning import fit_norm_scales
from ofa.methods.structured_guidance import (
    ExactGuidance,
    FirstOrderGuidance,
    Loss,
    StructuredGuidance,
    Weights,
    check_attention,
)
from ofa.models.introspection import model_window
from ofa.models.types import CausalLM, Tokenizer
from ofa.tasks.task import Example, Task
from ofa.training.config import TrainingConfig
from ofa.training.loss import cross_entropy_in_parts, encode_example
from ofa.training.records import StepRecord


@dataclass(frozen=True)
class Variant:
    """A guidance with its default weights λ_d and λ_m (for the first-order variant, shares)."""

    guidance: Callable[[Weights, Sequence[Loss]], StructuredGuidance]
    direction: float
    magnitude: float


VARIANTS = {
    "guided": Variant(ExactGuidance, 1e-2, 1e-5),
    "guided-first-order": Variant(FirstOrderGuidance, 0.1, 1.0),
}
"""Method name → the exact gradient, or projection, mixing and clipping. The unit of λ_m is that of 1/‖g‖²."""


def fit(
    model: CausalLM,
    tokenizer: Tokenizer,
    task: Task,
    shots: Sequence[Example],
    seed: int,
    *,
    variant: str = "guided",
    direction: float | None = None,
    magnitude: float | None = None,
    alignment: float = 0.0,
    other_tasks: Sequence[tuple[Task, Sequence[Example]]] = (),
    validation: Sequence[Example] = (),
    progress: Callable[[StepRecord, int], None] | None = None,
    **settings: Any,
) -> Predictor:
    """Tune every norm scale on the shots along the gradient of the guided objective.

    With `validation` examples, the scales of the epoch with the best accuracy on them are kept. A failed or interrupted
    run restores the model. The notes are the guidance's log and, if alignment has a weight, the names of the other
    tasks; without a weight these are not read.

    Args:
        variant: one of `VARIANTS`, whose weights are the defaults.
        direction: λ_d, the weight of 1 − cos(g, r). First order: the share of the average gradient that is mixed in; 0
            also keeps conflicts with it.
        magnitude: λ_m, the weight of max(0, ‖g‖ − τ)². First order: the share of the excess of ‖g‖ over τ that is
            removed; 1 clips to τ.
        alignment: λ_a, the weight of cos(g, s). First order: the share of a conflict with the source tasks that is
            removed; 1 projects.
        other_tasks: the source tasks with their shots; s is the gradient of their loss.
        settings: fields of `TrainingConfig`.

    Raises:
        InputError: a setting is wrong, or the model's attention has no second derivative, for the exact gradient; see
            also `training.loop.train`.
    """
    chosen = VARIANTS[variant]
    weights = Weights(
        chosen.direction if direction is None else direction,
        chosen.magnitude if magnitude is None else magnitude,
        alignment,
    )
    config = TrainingConfig(seed=seed, **settings)
    if chosen.guidance is ExactGuidance:
        check_attention(model)
    others = other_tasks if alignment > 0 else ()
    guide = chosen.guidance(weights, source_losses(model, tokenizer, others, config.batch_size))
    predictor = fit_norm_scales(
        model, tokenizer, task, shots, config, validation=validation, progress=progress, guidance=guide
    )
    notes = {**guide.notes, "other_tasks": [other.name for other, _ in others]} if others else guide.notes
    return replace(predictor, notes=notes)


def source_losses(
    model: CausalLM, tokenizer: Tokenizer, other_tasks: Sequence[tuple[Task, Sequence[Example]]], size: int
) -> list[Loss]:
    """Losses of at most `size` examples each, whose sum is the mean over the tasks of their shots' cross-entropy.

    Raises:
        InputError: a task has no shots.
    """
    losses: list[Loss] = []
    for task, shots in other_tasks:
        if not shots:
            raise InputError(f'the other task "{task.name}" has no shots to align with: give at least one')
        encoder = Encoder(tokenizer, task, model_window(model))
        encoded = [encode_example(encoder, shot) for shot in shots]
        losses += [_divided(loss, len(other_tasks)) for loss in cross_entropy_in_parts(model, encoded, size)]
    return losses


def _divided(loss: Loss, count: int) -> Loss:
    return lambda: loss() / count
