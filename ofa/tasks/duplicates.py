"""Warn of duplicates in the data: labels that look alike, repeated texts, texts under two labels."""

from __future__ import annotations

import functools
import logging
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from ofa.tasks.task import Example

logger = logging.getLogger(__name__)

_INVISIBLE = {*"\u034f\u115f\u1160\u2800\u3164\uffa0", *map(chr, range(0xFE00, 0xFE10))}
"""Invisible characters outside Unicode's categories format and control: fillers and variation selectors."""


def warn_of_alike_labels(examples: Iterable[Example], where: object) -> None:
    """Warn of labels that differ only in case, blanks, invisible characters or Unicode form, with their counts."""
    counts = Counter(example.label for example in examples)
    alike = defaultdict(list)
    for label in sorted(counts):
        alike[_folded(label)].append(f"{_shown(label)} ({counts[label]})")
    groups = [" and ".join(group) for group in alike.values() if len(group) > 1]
    if groups:
        _warn_once(
            f"labels of {where} differ only in case, blanks, invisible characters or Unicode form, and each is a class "
            f"of its own: {'; '.join(groups)}; spell labels that mean the same alike, or give --labels"
        )


def warn_of_duplicates(examples: Sequence[Example], where: object, *, pairs: bool) -> None:
    """Warn of texts that occur more than once with the same label, and of texts under two labels.

    With `pairs`, different completions of one prompt are legitimate, and only equal pairs are reported.
    """
    places: dict[str, dict[str, list[int]]] = {}
    for number, example in enumerate(examples, start=1):
        places.setdefault(example.text, {}).setdefault(example.label, []).append(number)
    again = [numbers for labels in places.values() for numbers in labels.values() if len(numbers) > 1]
    if again:
        what = "pair" if pairs else "text"
        _warn_once(
            f"{where} has {_count(len(again), what)} more than once, such as examples {again[0][0]} and {again[0][1]}: "
            "as shots they add nothing, and in a test set they count twice"
        )
    torn = [labels for labels in places.values() if len(labels) > 1]
    if torn and not pairs:
        shown = " and ".join(f"{_shown(label)} in example {numbers[0]}" for label, numbers in torn[0].items())
        what = f"{_count(len(torn), 'text')} under several labels"
        _warn_once(f"{where} has {what}, such as {shown}: correct the wrong ones")


def warn_of_shared_texts(train: Iterable[Example], test: Sequence[Example], where: object) -> None:
    """Warn of test texts that are training texts too."""
    known = {example.text for example in train}
    shared = sum(example.text in known for example in test)
    if shared:
        _warn_once(
            f"{shared} of the {_count(len(test), 'test text')} of {where} "
            f"{'is a training text' if shared == 1 else 'are training texts'} too: scores on them do not measure "
            "generalization"
        )


@functools.cache
def _warn_once(warning: str) -> None:
    """Log a warning once per process, although several parts of a command may read the same file."""
    logger.warning("%s", warning)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _folded(label: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", label).casefold())
    return "".join(character for character in folded if not (character.isspace() or _is_invisible(character)))


def _is_invisible(character: str) -> bool:
    return character in _INVISIBLE or unicodedata.category(character) in ("Cf", "Cc")


def _shown(label: str) -> str:
    """The label in quotes, with escapes if it has invisible characters."""
    plain = label == unicodedata.normalize("NFC", label) and all(
        character == " " or not (character.isspace() or _is_invisible(character)) for character in label
    )
    return f'"{label}"' if plain else ascii(label)
