"""Read rows in memory: a DataFrame, a data set of `datasets`, or a list of pairs, mappings or examples."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ofa.errors import InputError
from ofa.tasks.columns import Columns
from ofa.tasks.tables import FilePath, Row, Table
from ofa.tasks.task import Example

Data = FilePath | Iterable[Any]
"""Examples as a path, or as rows in memory."""


@dataclass(frozen=True)
class MemoryTable:
    """Rows in the form of `Table`, each with where it stands; `name` stands for the data in messages."""

    name: str
    rows: Iterable[tuple[str, Row]]
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        """Each row as (where it stands, values by column)."""
        return iter(self.rows)

    def __str__(self) -> str:
        return self.name


def is_path(data: object) -> bool:
    """True if `data` is a name or path, not rows in memory."""
    return isinstance(data, str | os.PathLike) or hasattr(data, "joinpath")


def settled(data: object) -> Any:
    """Rows that can be iterated repeatedly: a DataFrame, data set or list unchanged, any other iterable as a list.

    Raises:
        InputError: `data` has no rows.
    """
    if type(data).__module__.partition(".")[0] in ("pandas", "datasets") or isinstance(data, list):
        return data
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise InputError(
            f"examples cannot be read from a {type(data).__name__}: give a path, a DataFrame, a data set, or a list of "
            '(text, label) or {"text": …, "label": …}'
        )
    return list(data)


def table_of(data: Any, columns: Columns, separator: str | None = None) -> Table | MemoryTable:
    """The rows of data of any kind. Unnamed pairs are the text and the label of the `columns`, in this order.

    Raises:
        InputError: `data` has no rows. A row that cannot be used is refused when it is read.
    """
    if is_path(data):
        return Table(data, separator)
    package = type(data).__module__.partition(".")[0]
    if package == "pandas" and hasattr(data, "columns"):
        records = data.astype(object).where(data.notna(), None).to_dict("records")
        places = [f"row {index!r} of the DataFrame" for index in data.index]
        return MemoryTable("the DataFrame", list(zip(places, map(_named, records), strict=True)))
    if package == "datasets":
        return MemoryTable("the data set", _numbered(data, columns, "row", "the data set"), _class_names(data))
    return MemoryTable("the list", _numbered(settled(data), columns, "item", "the list"))


def _numbered(items: Iterable[object], columns: Columns, what: str, of: str) -> Iterator[tuple[str, Row]]:
    for number, item in enumerate(items):
        where = f"{what} {number} of {of}"
        yield where, _row(item, columns, where)


def _row(item: object, columns: Columns, where: str) -> Row:
    if isinstance(item, Mapping):
        return _named(item)
    pair = (item.text, item.label) if isinstance(item, Example) else item
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise InputError(f"{where} is {item!r:.60}: write (text, label), or a mapping of columns to values")
    if len(columns.names) != 1:
        raise InputError(
            f"{where} does not name the columns {', '.join(columns.names)} of the template: write mappings of columns "
            "to values"
        )
    return dict(zip((columns.names[0], columns.label_column), map(_plain, pair), strict=True))


def _named(item: Mapping[object, object]) -> Row:
    return {str(name): _plain(value) for name, value in item.items()}


def _plain(value: Any) -> object:
    """Convert numpy scalars to Python."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value


def _class_names(data: object) -> dict[str, tuple[str, ...]]:
    features = getattr(data, "features", None) or {}
    return {name: tuple(kind.names) for name, kind in features.items() if type(kind).__name__ == "ClassLabel"}
