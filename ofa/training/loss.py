"""The training loss: cross-entropy at the label's tokens, over the full vocabulary and over the label words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder, collate, scores_whole_words
from ofa.evaluation.head import HeadEncoder
from ofa.models.introspection import accepted_arguments
from ofa.models.load import is_encoder
from ofa.models.types import CausalLM
from ofa.tasks.task import Example


@dataclass(frozen=True)
class EncodedExample:
    """A prompt and the target tokens that follow it.

    `weight` multiplies the example's loss. `choices` holds, for each target, the tokens that a label word may have
    there; empty if `label_loss` is 0.
    """

    prompt: tuple[int, ...]
    targets: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...] = ()
    label_loss: float = 0.0
    weight: float = 1.0

    @property
    def read(self) -> list[int]:
        """The model's input: the prompt and all targets but the last."""
        return [*self.prompt, *self.targets[:-1]]


def encode_example(encoder: Encoder, example: Example, label_loss: float = 0.0) -> EncodedExample:
    """Encode an example, with its label's first token as target.

    If two labels begin with the same token, the targets are the whole label and the line end; in an open-ended task
    they are the whole completion and the end of the text. `label_loss` is the weight of a second cross-entropy, over
    the label words only (T-Few's length-normalised choice, arXiv 2205.05638).

    Raises:
        InputError: the label is not one of the task's, or `label_loss` is set for a task without label words.
    """
    if label_loss and (encoder.task.open_ended or isinstance(encoder, HeadEncoder)):
        raise InputError(f"task {encoder.task.name!r} has no label words, so label_loss has no meaning; leave it out")
    targets = encoder.encode_target(example.label, example.text)
    if encoder.task.open_ended:
        end = encoder.tokenizer.eos_token_id
        targets = targets if end is None else [*targets, int(end)]
    elif not scores_whole_words(encoder.labels):
        targets = targets[:1]
    prompt = tuple(encoder.encode_prompt(example.text, room=len(targets)))
    choices = _choices(encoder, targets) if label_loss else ()
    return EncodedExample(prompt, tuple(targets), choices, label_loss)


def balanced_weights(encoder: Encoder, examples: Sequence[Example]) -> list[float]:
    """Weights with mean 1 that give every class the same total.

    Raises:
        InputError: the task has no classes.
    """
    if encoder.task.open_ended:
        raise InputError(f"task {encoder.task.name!r} has no classes to weigh; leave class_weights out")
    counts = Counter(example.label for example in examples)
    return [len(examples) / (len(counts) * counts[example.label]) for example in examples]


def _choices(encoder: Encoder, targets: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """For each target, the next tokens of all label words that begin with the previous targets."""
    words = [encoder.encode_target(label) for label in encoder.labels]
    return tuple(
        tuple(sorted({word[place] for word in words if word[:place] == list(targets[:place]) and len(word) > place}))
        for place in range(len(targets))
    )


def cross_entropy(model: CausalLM, examples: Sequence[EncodedExample]) -> Tensor:
    """Mean over examples of the mean cross-entropy over target tokens, in nats, a float32 scalar.

    Each is taken over the full vocabulary, or the labels of an encoder's head, plus `label_loss` times the one over the
    target's `choices`.
    """
    device = next(model.parameters()).device
    return cross_entropy_of(model, {name: value.to(device) for name, value in batch_of(examples).items()})


def batch_of(examples: Sequence[EncodedExample]) -> dict[str, Tensor]:
    """The examples as tensors for `cross_entropy_of`.

    Returns:
        `input_ids` and `attention_mask`, (B, T); `kept`, the positions that have a target in some row; of every target
        its `rows`, `positions`, `places` in `kept`, `targets` and `weights`; and with a `label_loss`, the `choices` of
        every target, (targets, most choices), `is_choice` where they are real, and `label_loss`.
    """
    input_ids, attention_mask = collate([example.read for example in examples], 0)
    found = [
        (row, len(example.prompt) - 1 + offset, target, example.weight / (len(example.targets) * len(examples)))
        for row, example in enumerate(examples)
        for offset, target in enumerate(example.targets)
    ]
    rows, positions, targets, weights = (torch.tensor(values) for values in zip(*found, strict=True))
    kept, places = positions.unique(return_inverse=True)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "kept": kept, "rows": rows}
    batch |= {"positions": positions, "places": places, "targets": targets, "weights": weights}
    words = [(choice, example.label_loss) for example in examples for choice in example.choices]
    if words:
        batch["choices"], batch["is_choice"] = (value for value in collate([choice for choice, _ in words], 0))
        batch["label_loss"] = torch.tensor([weight for _, weight in words])
    return batch


def even_targets(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with as many targets and kept positions as the next power of two: the added ones have weight 0."""
    fills = {"kept": "kept", **dict.fromkeys(("rows", "positions", "places", "targets", "weights"), "rows")}
    fills |= dict.fromkeys(("choices", "is_choice", "label_loss"), "rows")
    added = {name: 2 ** (len(batch[name]) - 1).bit_length() - len(batch[name]) for name in ("kept", "rows")}
    return {
        name: torch.cat((value, value[:1].expand(added[fills[name]], *value.shape[1:]) * (name != "weights")))
        if name in fills
        else value
        for name, value in batch.items()
    }


def cross_entropy_of(model: CausalLM, batch: Mapping[str, Tensor]) -> Tensor:
    """The cross-entropy of a batch of `batch_of` on the model's device; nothing in it waits for the device."""
    input_ids, rows, targets = batch["input_ids"], batch["rows"], batch["targets"]
    if is_encoder(model.config):
        answers = model(input_ids=input_ids, attention_mask=batch.get("attention_mask")).logits[rows].float()
        return (F.cross_entropy(answers, targets, reduction="none") * batch["weights"]).sum()
    takes_positions = "logits_to_keep" in accepted_arguments(model)
    # Project only the target positions to the vocabulary: all would cost a quarter of a small model's work.
    extra: dict[str, object] = {"logits_to_keep": batch["kept"]} if takes_positions else {}
    mask = batch.get("attention_mask")
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False, **extra).logits
    # A prompt-tuned model returns logits of its virtual tokens first.
    logits = logits if takes_positions else logits[:, -input_ids.shape[1] :]
    read = logits[rows, batch["places"] if takes_positions else batch["positions"]].float()
    losses = F.cross_entropy(read, targets, reduction="none")
    if "choices" in batch:
        chosen = read.gather(1, batch["choices"]).masked_fill(batch["is_choice"] == 0, -torch.inf).logsumexp(1)
        losses = losses + batch["label_loss"] * (chosen - read.gather(1, targets[:, None])[:, 0])
    return (losses * batch["weights"]).sum()


def cross_entropy_in_parts(
    model: CausalLM, examples: Sequence[EncodedExample], size: int
) -> list[Callable[[], Tensor]]:
    """The mean cross-entropy of all examples as losses of at most `size` consecutive ones, which sum to it."""

    def part(start: int) -> Callable[[], Tensor]:
        own = examples[start : start + size]
        return lambda: len(own) / len(examples) * cross_entropy(model, own)

    return [part(start) for start in range(0, len(examples), size)]
