"""Which examples are used: the few shots to learn from and the class-balanced subset to test on.

Every draw is fixed by the seed alone, on any machine and Python. Each class draws from a generator of its own, seeded
by the seed and the label's name, and the order of a class's own examples is all that counts: neither the order of the
labels nor the way the classes are interleaved in the file changes what is drawn. More shots with the same seed contain
the fewer ones.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, TypeVar

from ofa.errors import InputError
from ofa.tasks.task import Example

Item = TypeVar("Item")


@dataclass(frozen=True)
class FewShot:
    """The drawn examples, in the order they are used, and their indices in the examples they were drawn from."""

    examples: tuple[Example, ...]
    indices: tuple[int, ...]

    @property
    def sha256(self) -> str:
        """Hash of the examples: tells whether a file still holds them at these indices, without keeping their text."""
        rows = [[example.text, example.label] for example in self.examples]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


Shots = int | Literal["all"]
"""Examples per class, or all that there are."""


def check_seed(seed: int) -> int:
    """A seed that every generator of random numbers takes, or an `InputError`."""
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"the seed {seed} has more than 64 bits: give one of at most 18 digits")
    return seed


def few_shot(examples: Sequence[Example], labels: Sequence[str], shots: Shots, seed: int) -> FewShot:
    """Draw `shots` examples per class without replacement and shuffle them; without labels, `shots` in all.

    Examples with a label not among `labels` are never drawn. Raises `InputError` where a class has too few, none where
    all are asked for.
    """
    check_seed(seed)
    if shots != "all" and (not isinstance(shots, int) or shots < 1):
        raise InputError(f"the number of shots must be at least 1, or all, not {shots!r}: ask for more")
    drawn = []
    for pool, name in _pools(examples, labels, seed):
        if shots == "all":
            if not pool:
                raise InputError(f"{name} has no training example: add some, or leave the label out")
            drawn.extend(pool)
            continue
        if len(pool) < shots:
            raise InputError(
                f"{name} has {len(pool)} training examples but {shots} shots were asked for: "
                "add examples or ask for fewer shots"
            )
        drawn.extend(pool[:shots])
    return _shuffled_choice(examples, drawn, f"{seed}/shots")


def unused(examples: Sequence[Example], drawn: FewShot) -> tuple[Example, ...]:
    """The examples that were not drawn, in their order, without those whose text occurs among the drawn."""
    taken = {example.text for example in drawn.examples}
    return tuple(example for example in examples if example.text not in taken)


def class_balanced(examples: Sequence[Example], labels: Sequence[str], size: int, seed: int) -> tuple[Example, ...]:
    """Draw up to `size` examples, as many of each class as possible, in shuffled order; without labels, any of them.

    A class that runs out leaves its share to the others, so the result is smaller than `size` only where the examples
    themselves are. A remainder goes to the labels that come first by name.
    """
    check_seed(seed)
    if size < 1:
        raise InputError(f"the size of the test set must be at least 1, not {size}: ask for more")
    pools = [pool for pool, _ in _pools(examples, labels, seed)]
    rounds = (index for one_of_each in zip_longest(*pools) for index in one_of_each if index is not None)
    drawn = [index for index, _ in zip(rounds, range(size), strict=False)]
    return _shuffled_choice(examples, drawn, f"{seed}/test").examples


def _pools(examples: Sequence[Example], labels: Sequence[str], seed: int) -> list[tuple[list[int], str]]:
    """The shuffled indices of each class, by label name, with the words an error names the class by."""
    if not labels:
        return [(_shuffled(range(len(examples)), f"{seed}/open-ended"), "the task")]
    members: dict[str, list[int]] = {label: [] for label in sorted(labels)}
    for index, example in enumerate(examples):
        if example.label in members:
            members[example.label].append(index)
    return [(_shuffled(pool, f"{seed}/class/{label}"), f'the class "{label}"') for label, pool in members.items()]


def _shuffled_choice(examples: Sequence[Example], drawn: list[int], seed: str) -> FewShot:
    indices = tuple(_shuffled(drawn, seed))
    return FewShot(examples=tuple(examples[index] for index in indices), indices=indices)


def _shuffled(items: Sequence[Item], seed: str) -> list[Item]:
    # Python promises the same numbers from random() in every version, but not the same shuffle() or sample(). A text
    # seeds the generator through SHA-512, not through hash(), which differs from process to process.
    generator = random.Random(seed)
    keys = [generator.random() for _ in items]
    return [items[position] for position in sorted(range(len(items)), key=keys.__getitem__)]
