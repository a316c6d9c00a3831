"""Group results by row and draw: the lines of tables, and the pairs of their comparisons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ofa.comparison.records import CONTEXTS, Record, Score
from ofa.errors import InputError


@dataclass(frozen=True, order=True)
class Problem:
    """A task with its shots and test examples. Only results of equal problems are comparable."""

    task: str
    shots: int
    test_size: int
    task_sha256: str


class Draw(NamedTuple):
    """One draw of shots, the same for every method, by which two rows are paired."""

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
        """The row's name in a table, with its context."""
        return f"{self.name} + demonstrations" if self.context == "demonstrations" else self.name


class Outcome(NamedTuple):
    """A row's result at one draw: the score in its context, and the cell's record for its cost."""

    score: Score
    record: Record


def draw_of(record: Record) -> Draw:
    """The task and the seed of a record."""
    cell = record.cell
    return Draw(Problem(cell.task, cell.shots, cell.test_size, cell.task_sha256), cell.seed)


def row_of(record: Record, context: str) -> Row:
    """The row of a record's test in `context`."""
    cell = record.cell
    settings = frozenset((name, str(value)) for name, value in cell.settings.items())
    return Row(cell.row, cell.method, settings, context)


def by_row(records: Iterable[Record]) -> dict[Row, dict[Draw, Outcome]]:
    """The finished tests of one model by row and draw, rows in the order of first appearance, context by context.

    The records must have one per cell, as from `store.read_records`.
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
    """The fair baseline of `method` for `row`: same context, and only settings that `row` has too.

    Of several, the one with the most settings; None if there is none.
    """
    fair = [
        other
        for other in rows
        if other.method == method and other.context == row.context and other.settings <= row.settings
    ]
    return max(fair, key=lambda other: len(other.settings), default=None)
