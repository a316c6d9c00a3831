"""Score labels by the classification head of an encoder: one logit per label, from the text alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder, collate, special_ids
from ofa.evaluation.plain_text import PlainText
from ofa.models.introspection import model_window
from ofa.models.types import CausalLM, Tokenizer
from ofa.tasks.task import Example, Task


class HeadEncoder(Encoder):
    """Token ids of texts, without what the template puts in front of and after them; a label's id is its logit's index.

    A text that does not fit is cut at its end, as tokenizers do.

    Raises:
        InputError: the task has no labels, or the model's head has others.
    """

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, task: Task) -> None:
        if task.open_ended:
            raise InputError(
                f"task {task.name!r} has no labels, and an encoder chooses one of the labels by its head: give "
                "labelled texts (--template '{text}' for columns text and label), or choose a causal language model"
            )
        known = model.config.label2id
        missing = [label for label in task.labels if label not in known]
        if missing:
            raise InputError(
                f"the head of the encoder {model.name_or_path or 'given'} answers {', '.join(known)} and not "
                f"{missing[0]!r}: fit it to the task with `ofa fit`, and give the adapter"
            )
        self.tokenizer = tokenizer
        self.task = task
        self.labels = {label: (known[label],) for label in task.labels}
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self.truncated = 0
        self._plain = PlainText(tokenizer)
        self.leading, self._trailing = special_ids(tokenizer)
        most = int(tokenizer.model_max_length)
        window = model_window(model)
        self.window: int = most if window is None else min(most, window - _unused_positions(model))

    def encode_prompt(self, text: str, *, demonstrations: Sequence[int] = (), room: int | None = None) -> list[int]:
        """Token ids of the text between the tokenizer's special tokens."""
        if not text.strip():
            raise InputError("the text to encode is blank: give it some words, or leave it out")
        ids = self._plain.ids("", text)
        limit = self.window - len(self.leading) - len(self._trailing)
        self.truncated += len(ids) > limit
        return [*self.leading, *ids[:limit], *self._trailing]

    def encode_demonstrations(
        self, examples: Sequence[Example], *, texts: Sequence[str] = (), room: int | None = None
    ) -> list[int]:
        """Refuse demonstrations, which an encoder was not trained to read."""
        if examples:
            raise InputError("an encoder reads one text at a time: leave the demonstrations out")
        return []


class HeadLogits:
    """The logits of an encoder's head in place of those of a vocabulary, see `PrefixCache`."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self._model = model
        self._pad_id = pad_id

    def last_logits(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Logits (B, labels of the head), float32."""
        device = next(self._model.parameters()).device
        ids, mask = (tensor.to(device) for tensor in collate(sequences, self._pad_id))
        logits: Tensor = self._model(input_ids=ids, attention_mask=mask).logits
        return logits.float()


def _unused_positions(model: nn.Module) -> int:
    """The number of learned positions that no token gets: RoBERTa counts from the one after its padding index."""
    tables = (module for path, module in model.named_modules() if path.endswith("position_embeddings"))
    padding = next((table.padding_idx for table in tables if isinstance(table, nn.Embedding)), None)
    return 0 if padding is None else int(padding) + 1
