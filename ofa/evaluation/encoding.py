"""Texts to token ids: prompts that fit the window, label words as they follow a prompt, right-padded batches."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ofa.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ofa.tasks.task import Example, Task


logger = logging.getLogger(__name__)

_ANY_TEXT = "text"


class Encoder:
    """Token ids of one task's prompts, labels and demonstrations under one tokenizer.

    `window` is the number of positions the model has (None: no limit), see `model_window`. `labels` maps each label
    word to its ids as they are scored (`label_token_ids`; empty for an open-ended task), `leading` holds the special
    tokens the tokenizer puts in front, `truncated` counts the texts that were cut so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: Task, window: int | None) -> None:
        self.tokenizer = tokenizer
        self.task = task
        self.window = window
        self.labels = {} if task.open_ended else label_token_ids(tokenizer, task)
        self.leading = _leading_ids(tokenizer)
        self.pad_id = _pad_id(tokenizer)
        self.truncated = 0

    def encode_prompt(self, text: str, *, demonstrations: Sequence[int] = (), room: int | None = None) -> list[int]:
        """Token ids of the prompt around `text`.

        With `demonstrations` (ids from `encode_demonstrations`) the ids are those that follow them, without special
        tokens. `room` positions stay free behind the prompt; by default those of the longest label word. A text that
        does not fit loses its beginning, the template nothing, and is counted in `truncated`.
        Raises InputError for an empty text, and where not even the template fits.
        """
        _require_text(text, "the text to encode")
        behind = self._label_room() if room is None else room
        limit = None if self.window is None else self.window - len(demonstrations) - behind
        ids = self._prompt_ids(text, bool(demonstrations))
        if limit is None or len(ids) <= limit:
            return ids
        self.truncated += 1
        return self._truncated_prompt_ids(text, bool(demonstrations), limit)

    def encode_prompts(
        self, texts: Sequence[str], *, demonstrations: Sequence[int] = (), room: int | None = None
    ) -> list[list[int]]:
        """`encode_prompt` of every text. Raises InputError that names the position of an empty one."""
        for index, text in enumerate(texts):
            _require_text(text, f"text {index + 1} of {len(texts)}")
        return [self.encode_prompt(text, demonstrations=demonstrations, room=room) for text in texts]

    def encode_target(self, label: str, text: str = _ANY_TEXT) -> list[int]:
        """Token ids of a label word, or of an open-ended task's completion, as they follow the prompt around `text`.

        Label words are the same behind every text. Raises InputError for a word that is not one of the task's labels,
        and for an empty completion.
        """
        if self.task.open_ended:
            return self._completion_ids(label, text)
        if label not in self.labels:
            known = ", ".join(self.labels)
            raise InputError(f"{label!r} is not a label of task {self.task.name!r}: use one of {known}")
        return list(self.labels[label])

    def training_rows(self, examples: Sequence[Example]) -> list[dict[str, list[int]]]:
        """Rows for a data collator: prompt and label in `input_ids`; in `labels` the label's tokens, −100 elsewhere.

        Raises:
            InputError: an example has no text, or a label that is not one of the task's.
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

        Where they do not fit the window together with the longest prompt around `texts`, whole demonstrations are
        dropped from the front, always of a class that has the most left, and a warning says how many. A prompt counts
        for at most half the window here: it is cut before it may drive out all demonstrations.
        """
        behind = self._label_room() if room is None else room
        limit = None if self.window is None else self.window - behind - self._longest_prompt(texts)
        kept = list(examples)
        ids = self._joined(kept)
        while kept and limit is not None and len(ids) > limit:
            del kept[_position_to_drop([self._class_of(example) for example in kept])]
            ids = self._joined(kept)
        if len(kept) < len(examples):
            logger.warning(
                "%d of %d demonstrations of task %r were dropped: the window of %s tokens holds no more",
                len(examples) - len(kept),
                len(examples),
                self.task.name,
                self.window,
            )
        return ids

    def _label_room(self) -> int:
        return max((len(ids) for ids in self.labels.values()), default=0)

    def _prompt_ids(self, text: str, continued: bool) -> list[int]:
        prompt = self.task.prompt(text)
        return self._continued(prompt) if continued else [*self.leading, *_plain_ids(self.tokenizer, prompt)]

    def _truncated_prompt_ids(self, text: str, continued: bool, limit: int) -> list[int]:
        # A shorter end of the text is nothing but blanks.
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
        first, *others = [self.task.demonstration(example) for example in examples]
        ids = [*self.leading, *_plain_ids(self.tokenizer, first)]
        return ids + [token for other in others for token in self._continued(other)]

    def _completion_ids(self, completion: str, text: str) -> list[int]:
        _require_text(completion, f"a completion of task {self.task.name!r}")
        prompt = self.task.prompt(text)
        before = _plain_ids(self.tokenizer, prompt)
        whole = _plain_ids(self.tokenizer, prompt + self.task.target(completion))
        if len(whole) > len(before) and whole[: len(before)] == before:
            return whole[len(before) :]
        # One token spans the boundary, but a model that completes the prompt begins with a token of its own there.
        return self._continued(completion)

    def _continued(self, text: str) -> list[int]:
        # A sentencepiece tokenizer marks the first word of a text as if a space preceded it; behind the newline that
        # ends a demonstration there is none.
        newline = _plain_ids(self.tokenizer, "\n")
        ids = _plain_ids(self.tokenizer, "\n" + text)
        return ids[len(newline) :] if ids[: len(newline)] == newline else _plain_ids(self.tokenizer, text)

    def _class_of(self, example: Example) -> str:
        return "" if self.task.open_ended else example.label


def label_token_ids(tokenizer: PreTrainedTokenizerBase, task: Task) -> dict[str, tuple[int, ...]]:
    """Token ids of each label word as it follows the prompt, in label order.

    Where two labels share their first token, every word has the line end that ends a demonstration: without it a label
    whose tokens begin another label's would always be the more probable one.
    Raises InputError where a label merges with the end of the template, or two labels cannot be told apart.
    """
    ids = {label: _ids_after_prompt(tokenizer, task, label) for label in task.labels}
    if scores_whole_words(ids):
        ids = {label: _ids_after_prompt(tokenizer, task, label, end="\n") for label in task.labels}
    _check_distinct(ids, task)
    return ids


def scores_whole_words(label_ids: Mapping[str, Sequence[int]]) -> bool:
    """Whether two labels share their first token, so that only whole words tell them apart."""
    return len({ids[0] for ids in label_ids.values()}) < len(label_ids)


def collate(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(input_ids, attention_mask)` of the sequences, padded on the right; both int64 (B, longest)."""
    longest = max(len(sequence) for sequence in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        attention_mask[row, : len(sequence)] = 1
    return input_ids, attention_mask


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Index batches of similar lengths, longest first, so that a batch too large for the memory fails at once.

    Every index occurs once. Raises InputError for a batch size below one.
    """
    if batch_size < 1:
        raise InputError(f"the batch size is {batch_size}: give one of at least 1")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a text beyond the window is truncated here, the tokenizer need not warn of it.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    plain = _plain_ids(tokenizer, _ANY_TEXT)
    full = list(tokenizer(_ANY_TEXT)["input_ids"])
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return tuple(full[:start])


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # Padding is masked and on the right, so that any id serves where the tokenizer has none of its own.
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in known if token is not None), 0)


def _check_distinct(ids: Mapping[str, tuple[int, ...]], task: Task) -> None:
    # In lexicographic order, what begins with a word follows it directly.
    ordered = sorted(ids, key=ids.__getitem__)
    for shorter, longer in pairwise(ordered):
        if ids[shorter] == ids[longer]:
            raise InputError(
                f"labels {shorter!r} and {longer!r} of task {task.name!r} are the same tokens to this tokenizer: "
                "rename one"
            )
        if ids[longer][: len(ids[shorter])] == ids[shorter]:
            raise InputError(
                f"label {longer!r} of task {task.name!r} begins with label {shorter!r}, and this tokenizer has no line "
                "end to tell them apart by: rename one"
            )


def _ids_after_prompt(tokenizer: PreTrainedTokenizerBase, task: Task, label: str, end: str = "") -> tuple[int, ...]:
    _require_text(label, f"a label of task {task.name!r}")
    prompt = task.prompt(_ANY_TEXT)
    before = _plain_ids(tokenizer, prompt)
    full = _plain_ids(tokenizer, prompt + task.target(label) + end)
    if full[: len(before)] != before or len(full) == len(before):
        raise InputError(
            f"label {label!r} merges with the end of the template of task {task.name!r} under this tokenizer: "
            "let the template end in a mark such as ':' and not in a blank"
        )
    return tuple(full[len(before) :])


def _require_text(text: str, where: str) -> None:
    if not text.strip():
        raise InputError(f"there is nothing but blanks in {where}: give it some words, or leave it out")


def _longest_fitting(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number of characters from `low` that fits, found by bisection; `high` do not, and 0 is for none."""
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
