"""Structured gradient guidance, its second derivative by a finite difference: about twice a step of norm tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ofa.errors import InputError
from ofa.guidance import FiniteDifferenceGuidance, Weights
from ofa.methods import Predictor
from ofa.methods.guided import DIRECTION, MAGNITUDE, fit_guided
from ofa.tasks.task import Example, Task


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
    _check_precision(model)
    weights, name = Weights(direction, magnitude, alignment), "guided-finite-difference"
    return fit_guided(
        name, FiniteDifferenceGuidance, weights, model, tokenizer, task, shots, seed, other_tasks, **options
    )


def _check_precision(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and torch.finfo(parameter.dtype).eps > torch.finfo(torch.float32).eps:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise InputError(
                f"{name} is {dtype}, in whose rounding a difference of two gradients is lost; load the model in "
                "float32, or use guided or guided-first-order"
            )
