"""Tokenize prompts, label words and demonstrations to fit the model's window, and pad them into batches."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ofa.errors import InputError
from ofa.evaluation.plain_text import PlainText
from ofa.models.types import Tokenizer

if TYPE_CHECKING:
    from ofa.tasks.task import Example, Task


logger = logging.getLogger(__name__)

_ANY_TEXT = "text"


class Encoder:
    """Token ids of one task's prompts, labels and demonstrations under one tokenizer.

    Attributes:
        window: number of positions of the model; None means no limit (see `model_window`).
        labels: the scored token ids of each label word (see `label_token_ids`); empty for an open-ended task.
        leading: special tokens that the tokenizer puts in front of a text; none if the template begins with them.
        truncated: number of texts cut so far.
    """

    def __init__(self, tokenizer: Tokenizer, task: Task, window: int | None) -> None:
        self.tokenizer = tokenizer
        self.task = task
        self._plain = PlainText(tokenizer)
        _check_between_columns(self._plain, task)
        self.window = window
        self.labels = {} if task.open_ended else label_token_ids(tokenizer, task)
        front, head = special_ids(tokenizer)[0], self._plain.ids(task.parts.head)
        self.leading = () if tuple(head[: len(front)]) == front else front
        self.pad_id = _pad_id(tokenizer)
        self.truncated = 0

    def encode_prompt(self, text: str, *, demonstrations: Sequence[int] = (), room: int | None = None) -> list[int]:
        """Token ids of the prompt around `text`.

        After `demonstrations` (ids from `encode_demonstrations`) the prompt has no special tokens of its own. `room`
        positions stay free after the prompt, by default enough for the longest label word. A text that does not fit
        is cut at its beginning and counted in `truncated`; the template is never cut.
        Raises InputError for an empty text, or if the template alone does not fit.
        """
        _require_text(text, "the text to encode")
        free = self._label_room() if room is None else room
        limit = None if self.window is None else self.window - len(demonstrations) - free
        ids = self._prompt_ids(text, bool(demonstrations))
        if limit is None or len(ids) <= limit:
            return ids
        self.truncated += 1
        return self._truncated_prompt_ids(text, bool(demonstrations), limit)

    def encode_prompts(
        self, texts: Sequence[str], *, demonstrations: Sequence[int] = (), room: int | None = None
    ) -> list[list[int]]:
        """Apply `encode_prompt` to every text. Raises InputError with the position of an empty text."""
        for index, text in enumerate(texts):
            _require_text(text, f"text {index + 1} of {len(texts)}")
        return [self.encode_prompt(text, demonstrations=demonstrations, room=room) for text in texts]

    def encode_target(self, label: str, text: str = _ANY_TEXT) -> list[int]:
        """Token ids of a label word, or of an open-ended task's completion, as they follow the prompt around `text`.

        The ids of a label word do not depend on `text`. Raises InputError for a word that is not a label of the task,
        or an empty completion.
        """
        if self.task.open_ended:
            return self._completion_ids(label, text)
        if label not in self.labels:
            known = ", ".join(self.labels)
            raise InputError(f"{label!r} is not a label of task {self.task.name!r}: use one of {known}")
        return list(self.labels[label])

    def training_rows(self, examples: Sequence[Example]) -> list[dict[str, list[int]]]:
        """Rows for a data collator: `input_ids` is prompt and label, `labels` is −100 except at the label's tokens.

        Raises:
            InputError: an example has an empty text, or a label that the task does not have.
        """
        rows = []
        for example in examples:
            label = self.encode_target(example.label, example.text)
            prompt = self.encode_prompt(example.text, room=len(label))
            rows.append({"input_ids": prompt + label, "labels": [-100] * len(prompt) + label})
        return rows

    def encode_demonstrations(
        self, examples: Sequence[Example], *, texts: Sequence[str] = (), room: int | None = None
    ) -> list[int]:
        """Token ids of the concatenated demonstrations, special tokens first; empty if there are none.

        If they do not fit the window together with the longest prompt around `texts`, whole demonstrations are dropped,
        each time the first one of the class with the most left, and a warning gives their number. A prompt counts as at
        most half the window here: a longer prompt is cut, so that one long text does not drop every demonstration.
        """
        if examples and self.task.chat:
            raise InputError("demonstrations are not turns of a chat: leave them out, or leave out the chat")
        free = self._label_room() if room is None else room
        limit = None if self.window is None else self.window - free - self._longest_prompt(texts)
        kept = list(examples)
        ids = self._joined(kept)
        while kept and limit is not None and len(ids) > limit:
            del kept[_position_to_drop([self._class_of(example) for example in kept])]
            ids = self._joined(kept)
        if len(kept) < len(examples):
            logger.warning(
                "%d of %d demonstrations of task %r were dropped: they do not fit the window of %s tokens",
                len(examples) - len(kept),
                len(examples),
                self.task.name,
                self.window,
            )
        return ids

    def _label_room(self) -> int:
        return max((len(ids) for ids in self.labels.values()), default=0)

    def _prompt_ids(self, text: str, continued: bool) -> list[int]:
        prompt = _prompt(self.task, text)
        return self._plain.continued(*prompt) if continued else [*self.leading, *self._plain.ids(*prompt)]

    def _truncated_prompt_ids(self, text: str, continued: bool, limit: int) -> list[int]:
        # Any shorter suffix of the text is blank.
        shortest = len(text) - len(text.rstrip()) + 1
        kept = _longest_fitting(
            shortest, len(text), lambda size: len(self._prompt_ids(text[-size:], continued)) <= limit
        )
        if kept == 0:
            raise InputError(
                f"the template of task {self.task.name!r} leaves no room for a text in a window of {self.window} "
                "tokens: shorten the template, or use a model with a longer context"
            )
        return self._prompt_ids(text[-kept:], continued)

    def _longest_prompt(self, texts: Sequence[str]) -> int:
        longest = max((len(self._prompt_ids(text, continued=True)) for text in texts), default=0)
        return longest if self.window is None else min(longest, self.window // 2)

    def _joined(self, examples: Sequence[Example]) -> list[int]:
        if not examples:
            return []
        first, *others = [self._demonstration(example) for example in examples]
        ids = [*self.leading, *self._plain.ids(*first)]
        return ids + [token for other in others for token in self._plain.continued(*other)]

    def _demonstration(self, example: Example) -> tuple[str, ...]:
        return (*_prompt(self.task, example.text), self.task.target(example.label), "\n")

    def _completion_ids(self, completion: str, text: str) -> list[int]:
        _require_text(completion, f"a completion of task {self.task.name!r}")
        prompt = _prompt(self.task, text)
        before = self._plain.ids(*prompt)
        whole = self._plain.ids(*prompt, self.task.target(completion))
        if len(whole) > len(before) and whole[: len(before)] == before:
            return whole[len(before) :]
        # A token spans the boundary here; generation still starts a new token after the prompt.
        return self._plain.continued("", completion)

    def _class_of(self, example: Example) -> str:
        return "" if self.task.open_ended else example.label


def label_token_ids(tokenizer: Tokenizer, task: Task) -> dict[str, tuple[int, ...]]:
    """Token ids of each label word as it follows the prompt, in label order.

    If two labels share their first token, every word gets the newline that ends a demonstration. Without it, a label
    that is a prefix of another would always be more probable.
    Raises InputError if a label merges with the end of the template, or two labels have the same tokens.
    """
    plain = PlainText(tokenizer)
    ids = {label: _ids_after_prompt(plain, task, label) for label in task.labels}
    if scores_whole_words(ids):
        ids = {label: _ids_after_prompt(plain, task, label, end="\n") for label in task.labels}
    _check_distinct(ids, task)
    return ids


def scores_whole_words(label_ids: Mapping[str, Sequence[int]]) -> bool:
    """True if two labels share their first token, so that whole words must be scored."""
    return len({ids[0] for ids in label_ids.values()}) < len(label_ids)


def collate(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded `(input_ids, attention_mask)` of the sequences; both int64 (B, longest)."""
    longest = max(len(sequence) for sequence in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        attention_mask[row, : len(sequence)] = 1
    return input_ids, attention_mask


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of indices of similar lengths, longest first, so that a batch that exceeds the memory fails at once.

    Raises InputError for a batch size below one.
    """
    if batch_size < 1:
        raise InputError(f"the batch size is {batch_size}: give one of at least 1")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _prompt(task: Task, text: str) -> tuple[str, str, str]:
    return task.parts.head, text, task.parts.tail


def special_ids(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the tokenizer puts in front of and after a text."""
    plain = list(tokenizer(_ANY_TEXT, add_special_tokens=False)["input_ids"])
    full = list(tokenizer(_ANY_TEXT)["input_ids"])
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return tuple(full[:start]), tuple(full[start + len(plain) :])


def _pad_id(tokenizer: Tokenizer) -> int:
    # Padding is masked and on the right: any id works if the tokenizer has no pad token.
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in known if token is not None), 0)


def _check_distinct(ids: Mapping[str, tuple[int, ...]], task: Task) -> None:
    # In lexicographic order, a word is directly followed by the words it is a prefix of.
    ordered = sorted(ids, key=ids.__getitem__)
    for shorter, longer in pairwise(ordered):
        if ids[shorter] == ids[longer]:
            raise InputError(
                f"labels {shorter!r} and {longer!r} of task {task.name!r} have the same tokens in this tokenizer: "
                "rename one"
            )
        if ids[longer][: len(ids[shorter])] == ids[shorter]:
            raise InputError(
                f"label {longer!r} of task {task.name!r} begins with label {shorter!r}, and this tokenizer drops the "
                "line end that would tell them apart: rename one"
            )


def _check_between_columns(plain: PlainText, task: Task) -> None:
    # A row's text has these literals in it, so they are read as text.
    for literal in task.parts.literals[1:-1]:
        for token in plain.controls_in(literal):
            raise InputError(
                f"the template of task {task.name!r} has the control token {token!r} between two columns: put it "
                "before the first or after the last"
            )


def _ids_after_prompt(plain: PlainText, task: Task, label: str, end: str = "") -> tuple[int, ...]:
    _require_text(label, f"a label of task {task.name!r}")
    prompt = _prompt(task, _ANY_TEXT)
    before = plain.ids(*prompt)
    full = plain.ids(*prompt, task.target(label), end)
    if full[: len(before)] != before or len(full) == len(before):
        raise InputError(
            f"label {label!r} merges with the end of the template of task {task.name!r} under this tokenizer: "
            "end the template in a mark such as ':', not in a blank"
        )
    return tuple(full[len(before) :])


def _require_text(text: str, where: str) -> None:
    if not text.strip():
        raise InputError(f"{where} is blank: give it some words, or leave it out")


def _longest_fitting(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """Largest size in [low, high) that fits, by bisection; 0 if `low` does not fit. `high` is known not to fit."""
    if not fits(low):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _position_to_drop(classes: Sequence[str]) -> int:
    counts = Counter(classes)
    most = max(counts.values())
    return next(position for position, name in enumerate(classes) if counts[name] == most)
