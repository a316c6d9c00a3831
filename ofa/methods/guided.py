"""Structured gradient guidance of norm tuning: exact, or of first order (docs/theory.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ofa.methods import Predictor
from ofa.methods.norm_tuning import fit_norm_scales
from ofa.methods.structured_guidance import ExactGuidance, FirstOrderGuidance, Weights, check_attention
from ofa.models.types import CausalLM, Tokenizer
from ofa.tasks.task import Example, Task
from ofa.training.config import TrainingConfig
from ofa.training.records import StepRecord

VARIANTS = {
    "guided": (ExactGuidance, Weights(1e-2, 1e-5)),
    "guided-first-order": (FirstOrderGuidance, Weights(0.1, 1.0)),
}
"""Method name → its guidance: the exact gradient, or projection, mixing and clipping; and its default weights λ_d and
λ_m, whose unit is that of 1/‖g‖² (for the first-order variant, shares).
"""


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
    validation: Sequence[Example] = (),
    progress: Callable[[StepRecord, int], None] | None = None,
    **settings: Any,
) -> Predictor:
    """Tune every norm scale on the shots along the gradient of the guided objective.

    With `validation` examples, the scales of the epoch with the best accuracy on them are kept. A failed or interrupted
    run restores the model. The notes are the guidance's log.

    Args:
        variant: one of `VARIANTS`, whose weights are the defaults.
        direction: λ_d, the weight of 1 − cos(g, r). First order: the share of the average gradient that is mixed in; 0
            also keeps conflicts with it.
        magnitude: λ_m, the weight of max(0, ‖g‖ − τ)². First order: the share of the excess of ‖g‖ over τ that is
            removed; 1 clips to τ.
        settings: fields of `TrainingConfig`.

    Raises:
        InputError: a setting is wrong, or the model's attention has no second derivative, for the exact gradient; see
            also `training.loop.train`.
    """
    guidance, weights = VARIANTS[variant]
    given = {"direction": direction, "magnitude": magnitude}
    weights = replace(weights, **{name: weight for name, weight in given.items() if weight is not None})
    config = TrainingConfig(seed=seed, **settings)
    if guidance is ExactGuidance:
        check_attention(model)
    guide = guidance(weights)
    predictor = fit_norm_scales(
        model, tokenizer, task, shots, config, validation=validation, progress=progress, guidance=guide
    )
    return replace(predictor, notes=guide.notes)
