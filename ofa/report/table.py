"""A table as either writer sets it: columns, and entries with a text, what it sorts by, and how it stands out."""

from __future__ import annotations

from dataclasses import dataclass

from ofa.comparison.outcomes import Row
from ofa.report import formatting as shown
from ofa.report.statistics import Spread

WITH = {"prompt": "without demonstrations", "demonstrations": "with demonstrations"}


@dataclass(frozen=True)
class Entry:
    """One cell of a table. `value` is what it sorts by (None: behind everything); `tone` is best, up, down or muted."""

    text: str
    value: float | str | None = None
    tone: str = ""
    row: Row | None = None


@dataclass(frozen=True)
class Column:
    """A column's title, what it means, whether it holds numbers, and whether the smaller ones are the better ones."""

    title: str
    meaning: str = ""
    numeric: bool = True
    less: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its caption and the notes below it."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[str, ...] = ()


METHOD = Column("method", numeric=False)


def spread_entry(spread: Spread | None, seeds: int, best: float | None = None) -> Entry:
    """Mean ± deviation, with the number of seeds where it is not all of them."""
    if spread is None:
        return Entry(shown.NOTHING)
    fewer = f" ({spread.count})" if spread.count < seeds else ""
    return Entry(shown.percent_spread(spread) + fewer, spread.mean, "best" if spread.mean == best else "")
