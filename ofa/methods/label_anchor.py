"""Label anchor: of the demonstrations only keys and values of template and labels stay (arXiv 2305.14160).

The demonstrations are run once, whole; then the keys and values of their texts are dropped, and every prompt attends to
what is left. Of the tokens of "Review: a warm film\\nSentiment: positive\\n" those stay that stand for

- "Review:", the template before the text; in the first demonstration with the tokenizer's special tokens before it
  (ours: a model trained behind such a token attends to it heavily);
- "\\nSentiment: positive", the template behind the text and the label; in every demonstration, the last too (ours);
- "\\n", the line end, which goes with what follows: the next demonstration's "Review:", behind the last one the prompt.

Where a token holds both text and template it stays if the template's part is more than a blank: " a" does not, ".\\n",
one token in many vocabularies, does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder
from ofa.evaluation.prefix_cache import PrefixCache
from ofa.evaluation.scorer import Scorer
from ofa.methods import Predictor, nothing_to_release
from ofa.models.introspection import evaluating, model_window
from ofa.tasks.task import Example, Task


def fit(model: Any, tokenizer: Any, task: Task, shots: Sequence[Example], seed: int) -> Predictor:
    """Score the label words of prompts that attend to the anchors of the demonstrations, in the order of `shots`.

    Positions and what fits the window are as with all demonstrations in context, see `PrefixCache` and `Encoder`. The
    notes tell how many anchors there are, special tokens not counted.

    Raises:
        InputError: the task has no labels, or the model cannot go on from a part of its cache.
    """
    if task.open_ended:
        raise InputError(f"task {task.name!r} has no labels that could be anchors: use icl instead")
    scorer = LabelAnchorScorer(model, tokenizer, task, demonstrations=shots)
    with evaluating(model):
        prefix = scorer.shared_prefix(scorer.encoder.encode_demonstrations(shots))
    return Predictor(
        scorer,
        nothing_to_release,
        contexts=("prompt",),
        stored_bytes=prefix.cached_bytes,
        notes={"extra_tokens": max(0, len(prefix.kept) - len(scorer.encoder.leading))},
    )


class LabelAnchorScorer(Scorer):
    """Scores labels behind demonstrations of which the prompts see no text."""

    def __init__(self, model: Any, tokenizer: Any, task: Task, *, demonstrations: Sequence[Example]) -> None:
        super().__init__(model, tokenizer, task, demonstrations=demonstrations)
        self.encoder: AnchorEncoder = AnchorEncoder(tokenizer, task, model_window(model))

    def shared_prefix(self, demonstrations: Sequence[int]) -> PrefixCache:
        """As the plain scorer's, but for the dropped keys and values of the demonstrations encoded last."""
        return PrefixCache(self.model, demonstrations, self.encoder.pad_id, kept=self.encoder.anchors)


class AnchorEncoder(Encoder):
    """An encoder that knows which tokens of the demonstrations it encoded last, by position, are anchors."""

    def __init__(self, tokenizer: Any, task: Task, window: int | None) -> None:
        super().__init__(tokenizer, task, window)
        self.anchors: list[int] = []

    def _joined(self, examples: Sequence[Example]) -> list[int]:
        ids: list[int] = []
        self.anchors = []
        for example in examples:
            own, head, tail = self._parts(example, first=not ids)
            before, behind = _covered(own, head), _covered(own[::-1], tail[::-1])
            kept = {*range(before), *range(len(own) - behind, len(own))}
            self.anchors.extend(len(ids) + position for position in sorted(kept))
            ids.extend(own)
        return ids

    def _parts(self, example: Example, *, first: bool) -> tuple[list[int], list[int], list[int]]:
        """Ids of a demonstration, of what stands before its text, and of what stands behind it."""
        parts = self.task.parts
        head, tail = parts.head.rstrip(" "), parts.tail + self.task.target(example.label) + "\n"
        if first:
            alone = self.tokenizer(head, add_special_tokens=False)["input_ids"]
            return super()._joined([example]), [*self.leading, *alone], self._continued(tail)
        return self._continued(self.task.demonstration(example)), self._continued(head), self._continued(tail)


def _covered(ids: Sequence[int], part: Sequence[int]) -> int:
    """How many of the first ids hold something of a part that was encoded alone."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, part, strict=False)))
    # What is left of the part has merged with the text next to it.
    return same + (same < len(part))
