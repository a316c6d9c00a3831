"""Read the text and the label from a row of data: find their columns and interpret the values."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ofa.errors import InputError, refuse_surrogates
from ofa.tasks.template import Template

_WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0+)?")
_BOOLEANS = ("false", "true")


@dataclass(frozen=True)
class Columns:
    """The columns of a template, where {text} stands for `text_column`, and the column of the label."""

    template: Template
    text_column: str
    label_column: str
    pairs: bool = False

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The columns of the template."""
        return tuple(self.text_column if slot == "text" else slot for slot in self.template.slots)

    def text(self, row: Mapping[str, object], where: str) -> str:
        """The text of a row, in the form of `Task.text_of`.

        Raises:
            InputError: a column is missing or holds no text, or the column of {text} (without it, every column) is
                empty.
        """
        text = self.text_or_none(row, where)
        if text is None:
            needed = self.text_column if "text" in self.template.slots else " and the ".join(self.names)
            raise InputError(f"{where}: the {needed} is empty: fill it in or remove the row")
        return text

    def text_or_none(self, row: Mapping[str, object], where: str) -> str | None:
        """The text of a row, or None if it is empty.

        Raises:
            InputError: a column is missing or holds no text.
        """
        values = [self._value(row, name, where) for name in self.names]
        needed = [value for slot, value in zip(self.template.slots, values, strict=True) if slot == "text"] or values
        return self.template.joined(values) if any(value.strip() for value in needed) else None

    def label(self, row: Mapping[str, object], where: str, words: Sequence[str] = (), names: Sequence[str] = ()) -> str:
        """The label of a row (see `label_word`), or the completion of a pair.

        Raises:
            InputError: the column is missing or empty, or its value is not one of `words`.
        """
        own = self.label_column if self.label_column in row else None
        value = row[own or find_column(self.label_column, row, where, "--label-column")]
        written = value_text(value, self.label_column, where)
        if not written.strip():
            raise InputError(f"{where}: the {self.label_column} is empty: fill it in or remove the row")
        if self.pairs:
            return written
        found = label_word(value, words, names)
        if found is None:
            raise unknown_label(written.strip(), words, where)
        return found

    def _value(self, row: Mapping[str, object], name: str, where: str) -> str:
        flag = "--text-column" if name == self.text_column else None
        own = name if name in row else find_column(name, row, where, flag)
        value = value_text(row[own], name, where)
        return value if self.pairs else value.strip()


def find_column(name: str, columns: Iterable[str], where: str, flag: str | None = None) -> str:
    """The column of this name, or else the only one whose name differs only in case or surrounding blanks.

    Raises:
        InputError: there is none, or several differ only in that. `flag` is the option that names another column.
    """
    known = tuple(columns)
    if name in known:
        return name
    alike = [column for column in known if column.strip().casefold() == name.strip().casefold()]
    if len(alike) == 1:
        return alike[0]
    found = ", ".join(f'"{column}"' for column in known) or "none"
    if alike:
        raise InputError(
            f'{where} has no column "{name}", and both {" and ".join(alike)} may be meant: write one exactly'
        )
    remedy = f": name the right one with {flag}, or write a header line if these are values"
    if flag is None:
        remedy = (
            did_you_mean(name, known) or ": rename a column, or correct the template, in which {{ and }} are braces"
        )
    raise InputError(f'{where} has no column "{name}" (columns found: {found}){remedy}')


def value_text(value: object, column: str, where: str) -> str:
    """A value of a column as text; empty if missing.

    Raises:
        InputError: it is not a text, number or boolean, holds a NUL character, or cannot be encoded as UTF-8.
    """
    if value is None or value != value:  # NaN marks a missing value in pandas
        return ""
    if isinstance(value, bool):
        return _BOOLEANS[value]
    if not isinstance(value, str | int | float):
        raise InputError(f'{where}: the {column} is {_shown(value)}, which is not text: write it as "..." in quotes')
    text = str(value)
    if "\0" in text:
        raise InputError(f"{where}: the {column} holds a NUL character, a sign of damage: correct or remove the row")
    refuse_surrogates(text, f"{where}: the {column}")
    return text


def label_word(value: object, words: Sequence[str] = (), names: Sequence[str] = ()) -> str | None:
    """The label that a value stands for, or None. Text, digits, floats and booleans follow one rule in every format.

    A value equal to one of the `words` is that word; 1, 1.0, "1" and "1.0" are equal, and so are booleans in any case.
    Otherwise the integers 0, 1, … (or false, true) index the words, unless the words are numbers themselves. `names`
    are the data's names of its integers: a name that is one of the words means that word, and without words the name is
    the label.
    """
    written = value_text(value, "label", "the row").strip()
    number = _number(written)
    name = names[number] if number is not None and 0 <= number < len(names) else None
    candidates = [written, name, None if number is None else str(number)]
    if not words:
        return next((one for one in (name, candidates[2], written) if one), None)
    for candidate in candidates:
        if candidate in words:
            return candidate
    if written.casefold() in _BOOLEANS:
        number = _BOOLEANS.index(written.casefold())
        same = [word for word in words if word.casefold() == written.casefold()]
        if len(same) == 1:
            return same[0]
        if len(words) != len(_BOOLEANS):
            return None
    if number is None and written in names:
        number = names.index(written)
    in_order = number is not None and 0 <= number < len(words) and not any(_number(word) is not None for word in words)
    return words[number] if in_order and number is not None else None


def sorted_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """The distinct labels, sorted as numbers if all are numbers, else alphabetically."""
    found = set(labels)
    numbers = {label: _number(label) for label in found}
    if any(number is None for number in numbers.values()):
        return tuple(sorted(found))
    return tuple(sorted(found, key=lambda label: (numbers[label], label)))


def are_numbers(labels: Sequence[str]) -> bool:
    """True if all labels are whole numbers."""
    return all(_number(label) is not None for label in labels)


def unknown_label(label: str, labels: Sequence[str], where: str) -> InputError:
    """The error for a label that the task does not have."""
    known = ", ".join(labels)
    hint = did_you_mean(label, labels) or ": correct the label or add it to the task"
    return InputError(f'{where}: the label "{label}" is not one of the labels of the task ({known}){hint}')


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A clause that suggests the closest known word, or "" if none is close."""
    folded = {candidate.casefold(): candidate for candidate in known}
    near = difflib.get_close_matches(word.strip().casefold(), folded, n=1)
    return f', did you mean "{folded[near[0]]}"?' if near else ""


def _number(written: str) -> int | None:
    whole = _WHOLE.fullmatch(written)
    return int(whole[1]) if whole and len(whole[1]) < 20 else None


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)
