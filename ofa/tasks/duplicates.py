"""Warnings of what is in the data twice: labels that look alike, texts that occur again, texts under two labels."""

from __future__ import annotations

import functools
import logging
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from ofa.tasks.task import Example

logger = logging.getLogger(__name__)

_INVISIBLE = {*"\u034f\u115f\u1160\u2800\u3164\uffa0", *map(chr, range(0xFE00, 0xFE10))}
"""Characters without a glyph of their own that Unicode does not file under format or control: fillers and selectors."""


def warn_of_alike_labels(examples: Iterable[Example], where: object) -> None:
    """Say which labels differ only in case, blanks, invisible characters or Unicode form, and how often each occurs."""
    counts = Counter(example.label for example in examples)
    alike = defaultdict(list)
    for label in sorted(counts):
        alike[_folded(label)].append(f"{_shown(label)} ({counts[label]})")
    groups = [" and ".join(group) for group in alike.values() if len(group) > 1]
    if groups:
        _say(
            f"labels of {where} differ only in case, blanks, invisible characters or Unicode form, and each is a class "
            f"of its own: {'; '.join(groups)}; write them alike where they mean the same, or give --labels"
        )


def warn_of_duplicates(examples: Sequence[Example], where: object, *, pairs: bool) -> None:
    """Say how many texts occur more than once with the same label, and how many under two labels.

    One prompt may well have several completions: of `pairs` only the same ones are said.
    """
    places: dict[str, dict[str, list[int]]] = {}
    for number, example in enumerate(examples, start=1):
        places.setdefault(example.text, {}).setdefault(example.label, []).append(number)
    again = [numbers for labels in places.values() for numbers in labels.values() if len(numbers) > 1]
    if again:
        what = "pair" if pairs else "text"
        _say(
            f"{where} has {_count(len(again), what)} more than once, such as examples {again[0][0]} and {again[0][1]}: "
            "as shots they teach nothing new, and in a test they count again"
        )
    torn = [labels for labels in places.values() if len(labels) > 1]
    if torn and not pairs:
        shown = " and ".join(f"{_shown(label)} in example {numbers[0]}" for label, numbers in torn[0].items())
        _say(f"{where} has {_count(len(torn), 'text')} under several labels, such as {shown}: correct the wrong ones")


def warn_of_shared_texts(train: Iterable[Example], test: Sequence[Example], where: object) -> None:
    """Say how many test texts are training texts too."""
    known = {example.text for example in train}
    shared = sum(example.text in known for example in test)
    if shared:
        _say(
            f"{shared} of the {_count(len(test), 'test text')} of {where} "
            f"{'is a training text' if shared == 1 else 'are training texts'} too: a score on them says little of new "
            "texts"
        )


@functools.cache
def _say(warning: str) -> None:
    """Once, although several parts of a command may read the same file."""
    logger.warning("%s", warning)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _folded(label: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", label).casefold())
    return "".join(character for character in folded if not (character.isspace() or _is_invisible(character)))


def _is_invisible(character: str) -> bool:
    return character in _INVISIBLE or unicodedata.category(character) in ("Cf", "Cc")


def _shown(label: str) -> str:
    """The label in quotes; with escapes where it holds what cannot be seen."""
    plain = label == unicodedata.normalize("NFC", label) and all(
        character == " " or not (character.isspace() or _is_invisible(character)) for character in label
    )
    return f'"{label}"' if plain else ascii(label)
