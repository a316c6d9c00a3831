"""Results by row and draw: what stands in one line of a table, and what two lines are paired by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ofa.comparison.records import CONTEXTS, Record, Score
from ofa.errors import InputError


@dataclass(frozen=True, order=True)
class Problem:
    """A task as it was posed. Results may be compared only where all of it is the same."""

    task: str
    shots: int
    test_size: int
    task_sha256: str


class Draw(NamedTuple):
    """One draw of shots: every method was given the same ones, so that two rows are paired by it."""

    problem: Problem
    seed: int


@dataclass(frozen=True)
class Row:
    """One line of a table: a method with its settings, tested in one context."""

    name: str
    method: str
    settings: frozenset[tuple[str, str]]
    context: str

    @property
    def label(self) -> str:
        """The row in words; with and without demonstrations in context are rows of their own."""
        return f"{self.name} + demonstrations" if self.context == "demonstrations" else self.name


class Outcome(NamedTuple):
    """What a row has at one draw: the test in its context, and the whole cell for what it cost."""

    score: Score
    record: Record


def draw_of(record: Record) -> Draw:
    """The task and the seed of a record."""
    cell = record.cell
    return Draw(Problem(cell.task, cell.shots, cell.test_size, cell.task_sha256), cell.seed)


def row_of(record: Record, context: str) -> Row:
    """The table's line that a record's test in `context` belongs to."""
    cell = record.cell
    settings = frozenset((name, str(value)) for name, value in cell.settings.items())
    return Row(cell.row, cell.method, settings, context)


def by_row(records: Iterable[Record]) -> dict[Row, dict[Draw, Outcome]]:
    """The finished tests of one model by row and draw, rows in the order of first appearance, context by context.

    There is one record per cell, as `store.read_records` returns them.
    """
    rows: dict[Row, dict[Draw, Outcome]] = defaultdict(dict)
    kept = list(records)
    for context in CONTEXTS:
        for record in kept:
            if record.done and context in record.scores:
                rows[row_of(record, context)][draw_of(record)] = Outcome(record.scores[context], record)
    return dict(rows)


def metric(outcomes: Mapping[Draw, Outcome], name: str = "accuracy") -> dict[Draw, float]:
    """One metric (`accuracy`, `macro_f1`, …) by draw.

    Raises:
        InputError: a cell was tested without it.
    """
    for outcome in outcomes.values():
        if name not in outcome.score.metrics:
            cell = outcome.record.cell
            raise InputError(
                f"the result of {cell.row} on {cell.task} with seed {cell.seed} has no {name.replace('_', ' ')}: "
                "remove its line from the results and run the comparison again"
            )
    return {draw: float(outcome.score.metrics[name]) for draw, outcome in outcomes.items()}


def baseline_of(row: Row, rows: Iterable[Row], method: str) -> Row | None:
    """The row of `method` that `row` is fairly set against: same context, and no setting that `row` does not share.

    Of several, the one that shares most; None where there is none.
    """
    fair = [
        other
        for other in rows
        if other.method == method and other.context == row.context and other.settings <= row.settings
    ]
    return max(fair, key=lambda other: len(other.settings), default=None)
