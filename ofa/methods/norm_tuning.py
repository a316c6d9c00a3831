"""Norm tuning: the same norm scales as OFA, by cross-entropy alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ofa.methods import Predictor, ofa
from ofa.tasks.task import Example, Task


def fit(model: Any, tokenizer: Any, task: Task, shots: Sequence[Example], seed: int, **options: Any) -> Predictor:
    """Tune every norm scale on the shots without regularizers; options as for `ofa.fit`."""
    return ofa.fit(model, tokenizer, task, shots, seed, **{**options, "step_ratio": 0.0, "sharpness": 0.0})
