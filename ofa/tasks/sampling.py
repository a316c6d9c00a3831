"""Draw the few shots to learn from, and the class-balanced subset to test on.

The seed fixes every draw, on any machine and Python version. Each class has its own generator, seeded by the seed and
the label's name. So a draw depends only on the order of the examples within a class, not on the order of the labels or
how the classes are interleaved. More shots with the same seed include the fewer ones.
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
    """The drawn examples, in the order of use, and their indices in the examples they were drawn from.

    Example:
        >>> pool = [ofa.Example(f"text {n}", "good" if n % 2 else "bad") for n in range(10)]
        >>> drawn = ofa.few_shot(pool, ("bad", "good"), shots=1, seed=0)
        >>> [pool[index] for index in drawn.indices] == list(drawn.examples), len(drawn.sha256)
        (True, 64)
    """

    examples: tuple[Example, ...]
    indices: tuple[int, ...]

    @property
    def sha256(self) -> str:
        """Hash of the examples, to check that a file still holds them at these indices without storing their text."""
        rows = [[example.text, example.label] for example in self.examples]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


Shots = int | Literal["all"]
"""Examples per class, or "all"."""


def check_seed(seed: int) -> int:
    """Return `seed`. Raises `InputError` if a random number generator would not accept it."""
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"the seed {seed} has more than 64 bits: give one of at most 18 digits")
    return seed


def few_shot(examples: Sequence[Example], labels: Sequence[str], shots: Shots, seed: int) -> FewShot:
    """Draw `shots` examples per class without replacement and shuffle them; without labels, `shots` in total.

    Examples with a label not in `labels` are never drawn.

    Returns:
        The examples, and their indices.

    Raises:
        InputError: a class has fewer than `shots` examples, or none if `shots` is "all"; `shots` is below 1.

    Example:
        >>> pool = [ofa.Example(f"text {n}", "good" if n % 2 else "bad") for n in range(10)]
        >>> drawn = ofa.few_shot(pool, ("bad", "good"), shots=2, seed=42)
        >>> sorted(example.label for example in drawn.examples)
        ['bad', 'bad', 'good', 'good']
    """
    check_seed(seed)
    if shots != "all" and (not isinstance(shots, int) or shots < 1):
        raise InputError(f"the number of shots must be at least 1, or all, not {shots!r}")
    drawn = []
    for pool, name in _pools(examples, labels, seed):
        if shots == "all":
            if not pool:
                raise InputError(f"{name} has no training example: add some, or leave the label out")
            drawn.extend(pool)
            continue
        if len(pool) < shots:
            raise InputError(
                f"{name} has {len(pool)} training example{'s' * (len(pool) != 1)} but {shots} shots were asked for: "
                "add examples or ask for fewer shots"
            )
        drawn.extend(pool[:shots])
    return _shuffled_choice(examples, drawn, f"{seed}/shots")


def unused(examples: Sequence[Example], drawn: FewShot) -> tuple[Example, ...]:
    """The examples that were not drawn, in their order, without any whose text was drawn."""
    taken = {example.text for example in drawn.examples}
    return tuple(example for example in examples if example.text not in taken)


def class_balanced(examples: Sequence[Example], labels: Sequence[str], size: int, seed: int) -> tuple[Example, ...]:
    """Draw up to `size` examples, the same number of each class, in shuffled order; without labels, any of them.

    If a class has too few, the others get its share, so the result has `size` examples unless there are fewer in all.
    A remainder goes to the first labels in alphabetical order.

    Returns:
        The examples.

    Raises:
        InputError: the size is below 1.

    Example:
        >>> pool = [ofa.Example(f"text {n}", "good" if n % 2 else "bad") for n in range(10)]
        >>> [example.label for example in ofa.class_balanced(pool, ("bad", "good"), size=6, seed=0)].count("good")
        3
    """
    check_seed(seed)
    if size < 1:
        raise InputError(f"the size of the test set must be at least 1, not {size}")
    pools = [pool for pool, _ in _pools(examples, labels, seed)]
    rounds = (index for one_of_each in zip_longest(*pools) for index in one_of_each if index is not None)
    drawn = [index for index, _ in zip(rounds, range(size), strict=False)]
    return _shuffled_choice(examples, drawn, f"{seed}/test").examples


def _pools(examples: Sequence[Example], labels: Sequence[str], seed: int) -> list[tuple[list[int], str]]:
    """The shuffled indices of each class, sorted by label, with the name of the class for messages."""
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
    # Python guarantees random() across versions, but not shuffle() or sample(). A str seed goes through SHA-512, not
    # through hash(), which differs between processes.
    generator = random.Random(seed)
    keys = [generator.random() for _ in items]
    return [items[position] for position in sorted(range(len(items)), key=keys.__getitem__)]
