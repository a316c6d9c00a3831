"""OFA with the sharpness term alone: norm scales tuned by cross-entropy + λ₂ H."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ofa.methods import Predictor, ofa
from ofa.methods.options import special_case
from ofa.tasks.task import Example, Task


def fit(model: Any, tokenizer: Any, task: Task, shots: Sequence[Example], seed: int, **options: Any) -> Predictor:
    """Tune every norm scale on the shots without the step-ratio term; other options as for `ofa.fit`.

    Raises:
        InputError: the options ask for the step-ratio term, or for no sharpness term.
    """
    chosen = special_case("ofa-sharpness", options, term="sharpness", step_ratio=0.0)
    return ofa.fit(model, tokenizer, task, shots, seed, **chosen)
