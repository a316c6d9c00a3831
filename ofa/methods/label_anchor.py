"""Label anchor: keep only the demonstrations' keys and values of template and labels (arXiv 2305.14160).

The demonstrations are run once, whole; then the keys and values of their texts are dropped, and every prompt attends to
the rest. Of "Review: a warm film\\nSentiment: positive\\n" these tokens stay:

- "Review:", the template before the text; in the first demonstration also the tokenizer's special tokens before it
  (our choice: models attend heavily to such a token);
- "\\nSentiment: positive", the template after the text and the label, also in the last demonstration (our choice);
- "\\n", the line end.

A token with both text and template stays if the template's part is more than a blank: " a" is dropped, but ".\\n", one
token in many vocabularies, stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder
from ofa.evaluation.prefix_cache import PrefixCache
from ofa.evaluation.scorer import Scorer
from ofa.methods import Predictor
from ofa.models.introspection import evaluating, model_window
from ofa.models.types import CausalLM, Tokenizer
from ofa.tasks.task import Example, Task


def fit(model: CausalLM, tokenizer: Tokenizer, task: Task, shots: Sequence[Example], seed: int) -> Predictor:
    """Score the label words of prompts that attend to the anchors of the demonstrations, in the order of `shots`.

    Positions and window are as with all demonstrations in context, see `PrefixCache` and `Encoder`. The notes have the
    number of anchors, without special tokens.

    Raises:
        InputError: the task has no labels, or the model cannot continue from a part of its cache.
    """
    if task.open_ended:
        raise InputError(f"task {task.name!r} has no labels to use as anchors: use icl instead")
    scorer = LabelAnchorScorer(model, tokenizer, task, demonstrations=shots)
    with evaluating(model):
        prefix = scorer.shared_prefix(scorer.encoder.encode_demonstrations(shots))
    return Predictor(
        scorer,
        contexts=("prompt",),
        stored_bytes=prefix.cached_bytes,
        notes={"extra_tokens": max(0, len(prefix.kept) - len(scorer.encoder.leading))},
    )


class LabelAnchorScorer(Scorer):
    """Scores labels after demonstrations whose texts are hidden from the prompts."""

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, task: Task, *, demonstrations: Sequence[Example]) -> None:
        super().__init__(model, tokenizer, task, demonstrations=demonstrations)
        self.encoder: AnchorEncoder = AnchorEncoder(tokenizer, task, model_window(model))

    def shared_prefix(self, demonstrations: Sequence[int]) -> PrefixCache:
        """The prefix cache with only the anchors of the demonstrations encoded last."""
        return PrefixCache(self.model, demonstrations, self.encoder.pad_id, kept=self.encoder.anchors)


class AnchorEncoder(Encoder):
    """An encoder that keeps the positions of the anchors in the demonstrations it encoded last."""

    def __init__(self, tokenizer: Tokenizer, task: Task, window: int | None) -> None:
        super().__init__(tokenizer, task, window)
        self.anchors: list[int] = []

    def _joined(self, examples: Sequence[Example]) -> list[int]:
        ids: list[int] = []
        self.anchors = []
        for example in examples:
            own, head, tail = self._parts(example, first=not ids)
            before, after = _covered(own, head), _covered(own[::-1], tail[::-1])
            kept = {*range(before), *range(len(own) - after, len(own))}
            self.anchors.extend(len(ids) + position for position in sorted(kept))
            ids.extend(own)
        return ids

    def _parts(self, example: Example, *, first: bool) -> tuple[list[int], list[int], list[int]]:
        """Token ids of a demonstration, of the part before its text, and of the part after it."""
        parts = self.task.parts
        head = parts.head.rstrip(" ")
        tail = self._plain.continued(parts.tail, self.task.target(example.label), "\n")
        if first:
            return super()._joined([example]), [*self.leading, *self._plain.ids(head)], tail
        return self._plain.continued(*self._demonstration(example)), self._plain.continued(head), tail


def _covered(ids: Sequence[int], part: Sequence[int]) -> int:
    """The number of leading ids that overlap with a part that was encoded separately."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, part, strict=False)))
    # The rest of the part has merged with the adjacent text into one token.
    return same + (same < len(part))
