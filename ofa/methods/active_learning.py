"""Choose the texts to label next: small margins (margin sampling), then diverse hidden states (greedy k-center)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ofa.errors import InputError
from ofa.evaluation.scorer import Progress, Scorer
from ofa.methods.hidden_states import last_hidden_states

POOL = 10
"""Uncertain texts that are compared for each one to choose."""


@dataclass(frozen=True)
class Choice:
    """A text to label: its index, the two most probable labels, the first one's probability, and the margin between."""

    index: int
    label: str
    runner_up: str
    probability: float
    margin: float


def choose(
    scorer: Scorer, texts: Sequence[str], count: int, progress: Callable[[str], Progress | None] = lambda _: None
) -> list[Choice]:
    """The `count` texts, or all if there are fewer, whose labels would teach the scorer's model the most.

    The 10 `count` texts with the smallest margin between the two most probable labels are candidates. The first choice
    has the smallest margin. Each next one is farthest from those chosen, by the model's hidden state at the last token
    of the prompt (k-center, arXiv 1708.00489). Texts should be distinct; `progress` gives the callback of a stage.

    Raises:
        InputError: the task is open-ended, or a text is empty.
    """
    if scorer.task.open_ended:
        raise InputError(f"task {scorer.task.name!r} has no labels to be uncertain between: choose texts by hand")
    best, labels = scorer.predict_proba(texts, progress=progress("scoring")).topk(2)
    margins = best[:, 0] - best[:, 1]
    candidates = margins.argsort(stable=True)[: POOL * count].tolist()
    if len(candidates) > 1:
        states = last_hidden_states(scorer, [texts[index] for index in candidates], progress("comparing"))
        candidates = [candidates[index] for index in farthest_first(states, count)]
    words = scorer.task.labels
    return [
        Choice(index, words[first], words[second], float(best[index, 0]), float(margins[index]))
        for index in candidates
        for first, second in [labels[index].tolist()]
    ]


def farthest_first(points: Tensor, count: int) -> list[int]:
    """Indices of `count` points (n, d), or of all: point 0, then always the one farthest from those chosen."""
    chosen = [0]
    distances = torch.full((len(points),), torch.inf)
    while len(chosen) < min(count, len(points)):
        distances = distances.minimum((points - points[chosen[-1]]).norm(dim=1))
        distances[chosen] = -1  # below the distance 0 of an equal point
        chosen.append(int(distances.argmax()))
    return chosen
