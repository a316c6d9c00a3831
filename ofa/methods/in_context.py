"""The untuned model, without examples in front of a text (zero-shot) or with the shots (in-context learning)."""

from __future__ import annotations

from collections.abc import Sequence

from ofa.evaluation.scorer import Scorer
from ofa.methods import Predictor
from ofa.models.types import CausalLM, Tokenizer
from ofa.tasks.task import Example, Task


def fit(model: CausalLM, tokenizer: Tokenizer, task: Task, shots: Sequence[Example], seed: int) -> Predictor:
    """Score the label words after the demonstrations, in the order of `shots`, and the prompt."""
    scorer = Scorer(model, tokenizer, task, demonstrations=shots)
    return Predictor(scorer, contexts=("demonstrations",))


def fit_zero_shot(model: CausalLM, tokenizer: Tokenizer, task: Task, shots: Sequence[Example], seed: int) -> Predictor:
    """Score the label words after the bare prompt; the shots are not used."""
    return Predictor(Scorer(model, tokenizer, task), contexts=("prompt",))
