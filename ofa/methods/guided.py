"""Structured gradient guidance of norm tuning: exact, by a finite difference, or of first order (docs/theory.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder
from ofa.methods import Predictor
from ofa.methods.norm_tuning import fit_norm_scales
from ofa.methods.options import special_case
from ofa.methods.structured_guidance import (
    ExactGuidance,
    FiniteDifferenceGuidance,
    FirstOrderGuidance,
    Loss,
    StructuredGuidance,
    Weights,
    check_attention,
)
from ofa.models.introspection import model_window
from ofa.tasks.task import Example, Task
from ofa.training.config import TrainingConfig
from ofa.training.loss import cross_entropy_in_parts, encode_example
from ofa.training.records import StepRecord
from ofa.tuning.norms import restore_norms, tune_norms

DIRECTION = 1e-2
"""λ_d, ours."""
MAGNITUDE = 1e-5
"""λ_m, ours; its unit is that of 1/‖g‖²."""


def fit(
    model: Any,
    tokenizer: Any,
    task: Task,
    shots: Sequence[Example],
    seed: int,
    *,
    direction: float = DIRECTION,
    magnitude: float = MAGNITUDE,
    alignment: float = 0.0,
    other_tasks: Sequence[tuple[Task, Sequence[Example]]] = (),
    **options: Any,
) -> Predictor:
    """Tune every norm scale on the shots along the exact gradient of the guided objective.

    Args:
        direction: λ_d, the weight of 1 − cos(g, r).
        magnitude: λ_m, the weight of max(0, ‖g‖ − τ)².
        alignment: λ_a, the weight of cos(g, s).
        other_tasks: the source tasks with their shots; s is the gradient of their loss.
        options: as for `fit_guided`.

    Raises:
        InputError: a setting is wrong, or the model's attention has no second derivative; see also
            `training.loop.train`.
    """
    check_attention(model)
    weights = Weights(direction, magnitude, alignment)
    return fit_guided("guided", ExactGuidance, weights, model, tokenizer, task, shots, seed, other_tasks, **options)


def fit_guided(
    method: str,
    guidance: Callable[[Weights, Sequence[Loss]], StructuredGuidance],
    weights: Weights,
    model: Any,
    tokenizer: Any,
    task: Task,
    shots: Sequence[Example],
    seed: int,
    other_tasks: Sequence[tuple[Task, Sequence[Example]]],
    *,
    validation: Sequence[Example] = (),
    progress: Callable[[StepRecord, int], None] | None = None,
    **settings: Any,
) -> Predictor:
    """Tune every norm scale on the shots with a guidance; `settings` are fields of `TrainingConfig`.

    With `validation` examples, the scales of the epoch with the best accuracy on them are kept. A failed or interrupted
    run restores the model. The notes are the guidance's log and, if alignment has a weight, the names of the other
    tasks; without a weight these are not read.

    Raises:
        InputError: a setting is wrong or belongs to the regularizers; see `TrainingConfig` and `training.loop.train`.
    """
    config = TrainingConfig(seed=seed, **special_case(method, settings, step_ratio=0.0, sharpness=0.0))
    others = other_tasks if weights.alignment > 0 else ()
    guide = guidance(weights, source_losses(model, tokenizer, others, config.batch_size))
    predictor = fit_norm_scales(
        model, tokenizer, task, shots, config, validation=validation, progress=progress, guidance=guide
    )
    notes = {**guide.notes, "other_tasks": [other.name for other, _ in others]} if others else guide.notes
    return replace(predictor, notes=notes)


def source_losses(
    model: Any, tokenizer: Any, other_tasks: Sequence[tuple[Task, Sequence[Example]]], size: int
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


def fit_first_order(
    model: Any,
    tokenizer: Any,
    task: Task,
    shots: Sequence[Example],
    seed: int,
    *,
    direction: float = 0.1,
    magnitude: float = 1.0,
    alignment: float = 0.0,
    other_tasks: Sequence[tuple[Task, Sequence[Example]]] = (),
    **options: Any,
) -> Predictor:
    """Tune every norm scale on the shots along gradients changed by projection, mixing and clipping.

    Args:
        direction: a, the share of the average gradient that is mixed in; 0 also keeps conflicts with it.
        magnitude: share of the excess of ‖g‖ over τ that is removed; 1 clips to τ.
        alignment: share of a conflict with the source tasks that is removed; 1 projects.
        other_tasks: the source tasks with their shots; s is the gradient of their loss.
        options: as for `fit_guided`.

    Raises:
        InputError: a setting is wrong, or a share is not between 0 and 1; see also `training.loop.train`.
    """
    shares, name = Weights(direction, magnitude, alignment), "guided-first-order"
    return fit_guided(name, FirstOrderGuidance, shares, model, tokenizer, task, shots, seed, other_tasks, **options)


def fit_finite_difference(
    model: Any,
    tokenizer: Any,
    task: Task,
    shots: Sequence[Example],
    seed: int,
    *,
    direction: float = DIRECTION,
    magnitude: float = MAGNITUDE,
    alignment: float = 0.0,
    other_tasks: Sequence[tuple[Task, Sequence[Example]]] = (),
    **options: Any,
) -> Predictor:
    """Tune every norm scale on the shots; arguments as for `fit`.

    Half precision would round the difference of two gradients away. So a bfloat16 or float16 model computes in float32
    while it is tuned, with 4 more bytes per weight, and gets its own weights back afterwards.

    Raises:
        InputError: a setting is wrong, or the model is quantized; see also `training.loop.train`.
    """
    _refuse_quantized(model)
    weights, name = Weights(direction, magnitude, alignment), "guided-finite-difference"
    try:
        tune_norms(model)
        with _frozen_weights_in_float32(model):
            return fit_guided(
                name, FiniteDifferenceGuidance, weights, model, tokenizer, task, shots, seed, other_tasks, **options
            )
    except BaseException:
        restore_norms(model)
        raise


def _refuse_quantized(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise InputError(
                f"{name} is quantized, and its rounding hides a difference of two gradients; load the model "
                "unquantized, or use guided or guided-first-order"
            )


@contextmanager
def _frozen_weights_in_float32(model: nn.Module) -> Iterator[None]:
    """Compute in float32; afterwards the original weight tensors are restored."""
    narrow = [p for p in model.parameters() if not p.requires_grad and p.dtype.itemsize < torch.float32.itemsize]
    own = [parameter.data for parameter in narrow]
    try:
        for parameter in narrow:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, data in zip(narrow, own, strict=True):
            parameter.data = data
