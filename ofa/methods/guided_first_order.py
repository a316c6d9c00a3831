"""Structured gradient guidance without second derivatives: about the cost of norm tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ofa.guidance import FirstOrderGuidance, Weights
from ofa.methods import Predictor
from ofa.methods.guided import fit_guided
from ofa.tasks.task import Example, Task


def fit(
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
        direction: a, the share of the average gradient that is mixed in; 0 also leaves conflicts with it alone.
        magnitude: share of the excess of ‖g‖ over τ that is taken off; 1 clips to τ.
        alignment: share of a conflict with the source tasks that is taken out; 1 projects.
        other_tasks: each with its shots, which s is the gradient of.
        options: as for `guided.fit_guided`.

    Raises:
        InputError: a setting is wrong, the shares must lie between 0 and 1; see also `trainer.train`.
    """
    shares, name = Weights(direction, magnitude, alignment), "guided-first-order"
    return fit_guided(name, FirstOrderGuidance, shares, model, tokenizer, task, shots, seed, other_tasks, **options)
