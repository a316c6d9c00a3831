"""Batches of an optimizer step: its examples, and the demonstrations in front of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from ofa.evaluation.encoding import Encoder
from ofa.tasks.task import Example
from ofa.training.config import TrainingConfig
from ofa.training.loss import EncodedExample, balanced_weights, encode_example


class Batches:
    """The encoded examples of every step, which depend on nothing but the seed and the step.

    Each epoch is a new permutation. In a share of the steps (`demonstrated_steps`) other shots stand in front of every
    prompt, as many as there are classes.

    Raises:
        InputError: an example or a setting does not fit the task.
    """

    def __init__(self, encoder: Encoder, examples: Sequence[Example], config: TrainingConfig) -> None:
        self.encoder, self.examples, self.config = encoder, examples, config
        self.data = [encode_example(encoder, example, config.label_loss) for example in examples]
        if config.class_weights == "balanced":
            weights = balanced_weights(encoder, examples)
            self.data = [replace(item, weight=weight) for item, weight in zip(self.data, weights, strict=True)]
        if config.demonstrated_steps:
            encoder.encode_demonstrations(examples[:1])  # refuses a chat before the first step
        self.size = config.batch_size * config.accumulation
        self.per_epoch = math.ceil(len(self.data) / self.size)
        self.shots_per_class = len(self.data) / max(1, len(encoder.labels))

    def of(self, step: int) -> list[EncodedExample]:
        """The examples of one optimizer step, which counts from 0."""
        epoch, index = divmod(step, self.per_epoch)
        order = self._shuffled(f"epoch/{epoch}")
        chosen = order[index * self.size : (index + 1) * self.size]
        if self._generator(f"demonstrated/{step}").random() >= self.config.demonstrated_steps:
            return [self.data[i] for i in chosen]
        others = [i for i in order if i not in chosen]
        return self._demonstrated(chosen, others[: max(2, len(self.encoder.labels))])

    def _demonstrated(self, chosen: Sequence[int], shown: Sequence[int]) -> list[EncodedExample]:
        texts = [self.examples[i].text for i in chosen]
        room = max(len(self.data[i].targets) for i in chosen)
        prefix = self.encoder.encode_demonstrations([self.examples[i] for i in shown], texts=texts, room=room)
        prompts = [self.encoder.encode_prompt(text, demonstrations=prefix, room=room) for text in texts]
        return [replace(self.data[i], prompt=(*prefix, *prompt)) for i, prompt in zip(chosen, prompts, strict=True)]

    def _shuffled(self, name: str) -> list[int]:
        # Not torch.Generator, which on a CPU takes only 32 bits of the seed. And Python promises the same numbers in
        # every version only for random().
        generator = self._generator(name)
        keys = [generator.random() for _ in self.data]
        return sorted(range(len(keys)), key=keys.__getitem__)

    def _generator(self, name: str) -> random.Random:
        return random.Random(f"{self.config.seed}/{name}")
