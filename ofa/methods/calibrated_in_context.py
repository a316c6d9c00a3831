"""Calibrated in-context learning: divide label probabilities by those of content-free texts (arXiv 2102.09690)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ofa.evaluation.calibration import CONTENT_FREE
from ofa.evaluation.scorer import Progress, Scorer
from ofa.methods import Predictor
from ofa.models.types import CausalLM, Tokenizer
from ofa.tasks.task import Example, Task


def fit(model: CausalLM, tokenizer: Tokenizer, task: Task, shots: Sequence[Example], seed: int) -> Predictor:
    """Score the label words after the demonstrations, in the order of `shots`, and calibrate the scores."""
    scorer = CalibratedScorer(model, tokenizer, task, demonstrations=shots)
    return Predictor(scorer, contexts=("demonstrations",))


class CalibratedScorer(Scorer):
    """Scores labels relative to their scores for content-free texts after the same demonstrations."""

    def log_probabilities(self, texts: Sequence[str], *, progress: Progress | None = None) -> Tensor:
        """The log of p(label | text) / mean p(label | content-free text), normalised over the labels."""
        # One call, so that all texts get the same demonstrations.
        scores = super().log_probabilities([*CONTENT_FREE, *texts], progress=progress)
        free, scores = scores.split([len(CONTENT_FREE), len(texts)])
        return (scores - free.logsumexp(0)).log_softmax(1)
