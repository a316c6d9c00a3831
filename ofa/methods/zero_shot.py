"""Zero-shot: the prompt and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ofa.evaluation import Scorer
from ofa.methods import Predictor, nothing_to_release
from ofa.tasks.task import Example, Task


def fit(model: Any, tokenizer: Any, task: Task, shots: Sequence[Example], seed: int) -> Predictor:
    """Score the label words after the bare prompt; the shots are not used."""
    return Predictor(Scorer(model, tokenizer, task), nothing_to_release, contexts=("prompt",))
