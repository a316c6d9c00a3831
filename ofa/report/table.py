"""Tables for both writers: columns, and entries with text, sort value and emphasis."""

from __future__ import annotations

from dataclasses import dataclass

from ofa.comparison.outcomes import Row
from ofa.report import formatting as shown
from ofa.report.statistics import Spread

WITH = {"prompt": "without demonstrations", "demonstrations": "with demonstrations"}


@dataclass(frozen=True)
class Entry:
    """One cell of a table. `value` is its sort key (None sorts last); `tone` is best, up, down or muted."""

    text: str
    value: float | str | None = None
    tone: str = ""
    row: Row | None = None


@dataclass(frozen=True)
class Column:
    """A column's title and meaning; `numeric` for numbers, `less` if smaller is better."""

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
    """Mean ± deviation, with the number of seeds if some are missing."""
    if spread is None:
        return Entry(shown.NOTHING)
    fewer = f" ({spread.count})" if spread.count < seeds else ""
    return Entry(shown.percent_spread(spread) + fewer, spread.mean, "best" if spread.mean == best else "")
