"""Show progress while cells run: done, failed, left, and the estimated time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Protocol

from ofa.comparison.records import Cell, Record

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

_LIKENESS: tuple[Callable[[Cell], Hashable], ...] = (
    lambda cell: (cell.model, cell.task, cell.row, cell.shots, cell.test_size),
    lambda cell: (cell.model, cell.method),
)
"""Keys under which cells take about the same time, most specific first."""


class Expectation:
    """Estimates the time of cells from the most similar finished ones; failed ones do not count.

    Half way through `benchmarks/results/comparison_cpu` its estimate was 16 % too low, one from the cells per second,
    as rich has it, 35 %.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._seconds: dict[tuple[int, Hashable], list[float]] = defaultdict(list)
        for record in records:
            self.learn(record)

    def learn(self, record: Record) -> None:
        """Add the time of a finished cell."""
        if record.done:
            for rank, likeness in enumerate(_LIKENESS):
                self._seconds[rank, likeness(record.cell)].append(record.seconds)

    def seconds(self, cell: Cell) -> float | None:
        """The mean time of the most similar finished cells; None if there are none."""
        known = (self._seconds.get((rank, likeness(cell))) for rank, likeness in enumerate(_LIKENESS))
        return next((fmean(seconds) for seconds in known if seconds), None)

    def estimate(self, cells: Sequence[Cell], workers: int, begun: Mapping[str, float]) -> Estimate:
        """The time for these cells on that many workers; `begun` has the elapsed seconds of running ones, by key."""
        expected = {cell.key: self.seconds(cell) for cell in cells}
        left = [max(0.0, whole - begun.get(key, 0.0)) for key, whole in expected.items() if whole is not None]
        return Estimate(sum(left) / max(1, min(workers, len(cells))), len(cells) - len(left))


def in_words(seconds: float) -> str:
    """A duration for reading."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Estimate:
    """The time for cells with all workers busy, without the `unknown` ones, which have no similar finished cells."""

    seconds: float
    unknown: int

    def __str__(self) -> str:
        """The estimate in words."""
        if not self.unknown:
            return f"about {in_words(self.seconds)}"
        return f"more than {in_words(self.seconds)}" if self.seconds else "unknown time"


class Tally:
    """Counts of the cells of a run, and an estimate of what is left."""

    def __init__(self, cells: Sequence[Cell], records: Sequence[Record], workers: int) -> None:
        self.total, self.done, self.failed = len(cells), 0, 0
        self._left = {cell.key: cell for cell in cells}
        self._begun: dict[str, float] = {}
        self._expectation = Expectation(records)
        self._workers = workers

    @property
    def left(self) -> int:
        """Number of unfinished cells, including running ones."""
        return len(self._left)

    @property
    def under_way(self) -> list[Cell]:
        """Running cells, oldest first."""
        return [self._left[key] for key in self._begun]

    def started(self, cell: Cell) -> None:
        """Note that a cell has started, perhaps again."""
        self._begun.pop(cell.key, None)
        self._begun[cell.key] = time.monotonic()

    def finished(self, record: Record) -> None:
        """Note that a cell is done or has failed."""
        self.done += record.done
        self.failed += not record.done
        self._begun.pop(record.cell.key, None)
        self._left.pop(record.cell.key, None)
        self._expectation.learn(record)

    def estimate(self) -> Estimate:
        """The remaining time, less the elapsed time of running cells."""
        now = time.monotonic()
        begun = {key: now - since for key, since in self._begun.items()}
        return self._expectation.estimate(list(self._left.values()), self._workers, begun)

    def __str__(self) -> str:
        """Done, failed, left, estimated time."""
        told = f", {self.estimate()}" if self.left else ""
        return f"{self.done} of {self.total} done, {self.failed} failed, {self.left} left{told}"


class Progress(Protocol):
    """Receives the events of a run."""

    def started(self, cell: Cell) -> None:
        """A worker has started a cell."""
        ...

    def finished(self, record: Record) -> None:
        """A cell is done or has failed."""
        ...

    def say(self, text: str) -> None:
        """Another message for the user."""
        ...


@contextmanager
def shown(tally: Tally, *, quiet: bool = False) -> Iterator[Progress]:
    """Progress on standard error: a live line on a terminal, else a line for each cell; nothing if `quiet`."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False, emoji=False, quiet=quiet)
    if quiet or not console.is_terminal:
        yield _Lines(tally, console)
        return
    with console.status("loading the model") as status:
        yield _Status(tally, console, status)


class _Lines:
    """Plain lines for a log."""

    def __init__(self, tally: Tally, console: Console) -> None:
        self._tally, self._console = tally, console

    def started(self, cell: Cell) -> None:
        self._tally.started(cell)

    def finished(self, record: Record) -> None:
        self._tally.finished(record)
        self.say(f"{_result(record)} ({self._tally})")

    def say(self, text: str) -> None:
        self._console.print(f"ofa: {text}", soft_wrap=True)


class _Status(_Lines):
    """The same lines, with a live line below."""

    def __init__(self, tally: Tally, console: Console, status: Status) -> None:
        super().__init__(tally, console)
        self._status = status

    def started(self, cell: Cell) -> None:
        super().started(cell)
        self._update()

    def finished(self, record: Record) -> None:
        self._tally.finished(record)
        self.say(_result(record))
        self._update()

    def _update(self) -> None:
        from rich.text import Text

        now = "; ".join(f"{cell.row} on {cell.task}, seed {cell.seed}" for cell in self._tally.under_way)
        # A str would be parsed as markup.
        self._status.update(Text(f"{self._tally}" + (f" — {now}" if now else "")))


def _result(record: Record) -> str:
    cell = f"{record.cell.task}, {record.cell.row}, seed {record.cell.seed}"
    if not record.done:
        return f"{cell}: failed: {record.error}"
    scores = ", ".join(f"{score.accuracy:.3f} ({context})" for context, score in record.scores.items())
    return f"{cell}: accuracy {scores} in {in_words(record.seconds)}"
