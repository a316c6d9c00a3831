"""OFA with the step-ratio term alone: norm scales tuned by cross-entropy + λ₁ J."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ofa.methods import Predictor, ofa
from ofa.methods.options import special_case
from ofa.tasks.task import Example, Task


def fit(model: Any, tokenizer: Any, task: Task, shots: Sequence[Example], seed: int, **options: Any) -> Predictor:
    """Tune every norm scale on the shots without the sharpness term; other options as for `ofa.fit`.

    Raises:
        InputError: the options ask for the sharpness term, or for no step-ratio term.
    """
    chosen = special_case("ofa-step-ratio", options, term="step_ratio", sharpness=0.0)
    return ofa.fit(model, tokenizer, task, shots, seed, **chosen)
