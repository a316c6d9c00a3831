"""Calibrated in-context learning: label probabilities are divided by those of texts without content (2102.09690)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ofa.evaluation.scorer import Progress, Scorer
from ofa.methods import Predictor, nothing_to_release
from ofa.tasks.task import Example, Task

CONTENT_FREE = ("N/A", "[MASK]", "-")
"""The source has an empty text in place of the dash; a prompt here always has a text."""


def fit(model: Any, tokenizer: Any, task: Task, shots: Sequence[Example], seed: int) -> Predictor:
    """Score the label words behind the demonstrations, in the order of `shots`, and calibrate them."""
    scorer = CalibratedScorer(model, tokenizer, task, demonstrations=shots)
    return Predictor(scorer, nothing_to_release, contexts=("demonstrations",))


class CalibratedScorer(Scorer):
    """Scores labels relative to what the same demonstrations say of a text without content."""

    def log_probabilities(self, texts: Sequence[str], *, progress: Progress | None = None) -> Tensor:
        """The log of p(label | text) / mean p(label | content-free text), normalised over the labels."""
        # In one call, so that all have the same demonstrations in front.
        scores = super().log_probabilities([*CONTENT_FREE, *texts], progress=progress)
        free, scores = scores.split([len(CONTENT_FREE), len(texts)])
        return (scores - free.logsumexp(0)).log_softmax(1)
