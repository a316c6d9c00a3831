"""In-context learning: every demonstration before the prompt, computed once and shared by all queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ofa.evaluation import Scorer
from ofa.methods import Predictor, nothing_to_release
from ofa.tasks.task import Example, Task


def fit(model: Any, tokenizer: Any, task: Task, shots: Sequence[Example], seed: int) -> Predictor:
    """Score the label words after the demonstrations, in the order of `shots`, and the prompt."""
    scorer = Scorer(model, tokenizer, task, demonstrations=shots)
    return Predictor(scorer, nothing_to_release, contexts=("demonstrations",))
