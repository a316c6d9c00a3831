"""Schedule cells on workers: each loads the model, gets one cell after the other, and is replaced when it dies."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from ofa.comparison.engines import Event, Finished, Notice, Placement, Ready, Started
from ofa.comparison.engines.worker import Refused
from ofa.comparison.environment import library_versions, now
from ofa.comparison.records import Cell, Record
from ofa.errors import InputError

if TYPE_CHECKING:
    from ofa.comparison.cell import Outcome
    from ofa.comparison.plan import Job

ATTEMPTS = 3
"""Attempts for a cell whose workers die, and for workers that die while they load the model."""


class Worker(Protocol):
    """Handle of a process that runs cells."""

    placement: Placement

    @property
    def pid(self) -> int:
        """Its process id, once it is ready."""
        ...

    def receive(self) -> Ready | Refused | Outcome | None:
        """Its next message; None if it has died."""
        ...

    def give(self, job: Job) -> None:
        """Send it a cell; if it has died, `receive` returns None."""
        ...

    def end_in_words(self) -> str:
        """How it died, as part of a sentence."""
        ...

    def kill(self) -> None:
        """Kill it; it has no state to save."""
        ...


W = TypeVar("W", bound=Worker)


def run_crew(
    cells: Sequence[Cell],
    job: Callable[[Cell], Job],
    placements: Sequence[Placement],
    spawn: Callable[[Placement], W],
    wait_any: Callable[[list[W]], list[W]],
) -> Iterator[Event]:
    """Run all cells on one worker for each placement.

    `spawn` starts a worker; `wait_any` waits until some workers have a message or have died, and returns them, or none
    after a timeout.

    Raises:
        InputError: the workers cannot load the model.
    """
    crew = _Crew(cells, job, spawn)
    try:
        for placement in placements[: len(cells)]:
            crew.add_worker(placement)
        while crew.workers:
            heard = wait_any(list(crew.workers))
            yield from crew.silence() if not heard else ()
            for worker in heard:
                yield from crew.hear(worker)
    finally:
        for worker in crew.workers:
            worker.kill()


class _Crew(Generic[W]):
    """The workers, each with its current cell, and the backlog of cells."""

    def __init__(self, cells: Sequence[Cell], job: Callable[[Cell], Job], spawn: Callable[[Placement], W]) -> None:
        self.workers: dict[W, Cell | None] = {}
        self._loaded: set[W] = set()
        self._backlog = deque(cells)
        self._job, self._spawn = job, spawn
        self._deaths: Counter[str] = Counter()
        self._failed_starts = 0
        self._told_of_silence = False

    def add_worker(self, placement: Placement) -> None:
        """Start a worker."""
        self.workers[self._spawn(placement)] = None

    def silence(self) -> Iterator[Event]:
        """After a timeout, notify once if no worker has loaded the model."""
        if not self._loaded and not self._told_of_silence:
            self._told_of_silence = True
            yield Notice("no worker has started yet: the model takes long to load, or the cluster has no free slot")

    def hear(self, worker: W) -> Iterator[Event]:
        """Handle a worker's next message."""
        message = worker.receive()
        if message is None:
            yield from self._on_exit(worker)
        elif isinstance(message, Refused):
            raise message
        elif isinstance(message, Ready):
            self._loaded.add(worker)
            self._failed_starts = 0
            yield message
            yield from self._give_next(worker)
        else:
            yield Finished(message.record)
            yield from self._give_next(worker) if message.intact else self._replace(worker)

    def _give_next(self, worker: W) -> Iterator[Event]:
        if not self._backlog:
            self._retire(worker)
            return
        cell = self.workers[worker] = self._backlog.popleft()
        worker.give(self._job(cell))
        yield Started(cell, worker.pid)

    def _replace(self, worker: W) -> Iterator[Event]:
        """Replace a worker whose model was changed by a method."""
        self._retire(worker)
        if self._backlog:
            yield Notice("a method did not restore the model; a new worker loads it again")
            self.add_worker(worker.placement)

    def _on_exit(self, worker: W) -> Iterator[Event]:
        cell, why = self.workers.pop(worker), worker.end_in_words()
        if cell is not None:
            yield self._lost(cell, why)
        elif worker not in self._loaded:
            self._failed_starts += 1
            if self.workers:
                yield Notice(f"a worker {why} while it loaded the model; {len(self.workers)} continue")
                return
            if self._failed_starts == ATTEMPTS:
                raise InputError(
                    f"{ATTEMPTS} workers died while they loaded the model, the last one {why}: give them more memory, "
                    "or choose a smaller model"
                )
        if self._backlog:
            self.add_worker(worker.placement)

    def _lost(self, cell: Cell, why: str) -> Event:
        self._deaths[cell.key] += 1
        if self._deaths[cell.key] == ATTEMPTS:
            error = f"{ATTEMPTS} workers died while they ran this cell, the last one {why}"
            return Finished(Record(cell, error=error, finished=now(), versions=library_versions()))
        self._backlog.appendleft(cell)
        return Notice(f"the worker that ran {cell.row} on {cell.task}, seed {cell.seed}, {why}; the cell runs again")

    def _retire(self, worker: W) -> None:
        del self.workers[worker]
        worker.kill()
