"""LoRA of rank 1, the size nearest to norm tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ofa.methods import Predictor, lora
from ofa.methods.options import special_case
from ofa.tasks.task import Example, Task


def fit(model: Any, tokenizer: Any, task: Task, shots: Sequence[Example], seed: int, **options: Any) -> Predictor:
    """Train adapters of rank 1 on the query and value projections; other options as for `lora.fit`.

    Raises:
        InputError: the options ask for another rank.
    """
    return lora.fit(model, tokenizer, task, shots, seed, **special_case("lora-r1", options, rank=1))
