"""Structured gradient guidance, its second derivative by a finite difference: about twice a step of norm tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ofa.errors import InputError
from ofa.guidance import FiniteDifferenceGuidance, Weights
from ofa.methods import Predictor
from ofa.methods.guided import DIRECTION, MAGNITUDE, fit_guided
from ofa.tasks.task import Example, Task
from ofa.tuning import restore_norms, tune_norms


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

    A difference of two gradients is lost in the rounding of half precision: a model in bfloat16 or float16 computes in
    float32 while it is tuned, which takes 4 bytes more per weight, and is given back in its own dtype.

    Raises:
        InputError: a setting is wrong, or the model is quantized; see also `trainer.train`.
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
                f"{name} is quantized, and a difference of two gradients is lost in its rounding; load the model "
                "unquantized, or use guided or guided-first-order"
            )


@contextmanager
def _frozen_weights_in_float32(model: nn.Module) -> Iterator[None]:
    """Compute in float32; behind it the weights are the very tensors they were."""
    narrow = [p for p in model.parameters() if not p.requires_grad and p.dtype.itemsize < torch.float32.itemsize]
    own = [parameter.data for parameter in narrow]
    try:
        for parameter in narrow:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, data in zip(narrow, own, strict=True):
            parameter.data = data
