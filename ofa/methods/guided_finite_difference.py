"""Structured gradient guidance, its second derivative by a finite difference: about twice a step of norm tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ofa.errors import InputError
from ofa.guidance import FiniteDifferenceGuidance, StructuredGuidance, Weights
from ofa.methods import Predictor
from ofa.methods.guided import DIRECTION, MAGNITUDE, fit_guided, source_losses
from ofa.tasks.task import Example, Task
from ofa.trainer import TrainingConfig


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
    """Tune every norm scale on the shots; arguments as for `guided.fit`.

    Raises:
        InputError: a setting is wrong, or the model computes in less than float32; see also `trainer.train`.
    """
    weights = Weights(direction, magnitude, alignment)

    def guidance(config: TrainingConfig) -> StructuredGuidance:
        _check_precision(model)
        return FiniteDifferenceGuidance(weights, source_losses(model, tokenizer, other_tasks, config.batch_size))

    return fit_guided("guided-finite-difference", model, tokenizer, task, shots, seed, guidance, **options)


def _check_precision(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and torch.finfo(parameter.dtype).eps > torch.finfo(torch.float32).eps:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise InputError(
                f"{name} is {dtype}, in whose rounding a difference of two gradients is lost; load the model in "
                "float32, or use guided or guided-first-order"
            )
