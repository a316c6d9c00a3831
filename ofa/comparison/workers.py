"""Run cells in processes of this machine: each loads the model, gets cell after cell, and is replaced if it dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from ofa.comparison.environment import library_versions, now
from ofa.comparison.placement import Placement
from ofa.comparison.records import Cell, Record
from ofa.errors import InputError, in_words
from ofa.files import Json
from ofa.logs import quiet_libraries

if TYPE_CHECKING:
    from ofa.comparison.cell import CellRunner, Outcome
    from ofa.comparison.plan import Job

ATTEMPTS = 3
"""Attempts for a cell whose workers die, and for workers that die while they load the model."""

_SPAWN = multiprocessing.get_context("spawn")  # a forked process would share threads and GPU state with its parent


@dataclass(frozen=True)
class Source:
    """The model that every worker loads, as arguments of `load_model`, and the batch size of its tests."""

    arguments: Json
    batch_size: int = 16


@dataclass(frozen=True)
class Ready:
    """A worker has loaded the model; `versions` as in its records."""

    versions: Mapping[str, str]


Event = Ready | Record | str
"""A worker has loaded the model; a cell is done, or has failed finally; or a message for the user."""


class Refused(InputError):
    """The model cannot be loaded, and retrying would not help."""


def run_in_workers(
    cells: Sequence[Cell], job: Callable[[Cell], Job], source: Source, placements: Sequence[Placement]
) -> Iterator[Event]:
    """Start the cells in this order on one worker for each placement; closing the iterator ends all workers at once.

    Raises:
        InputError: the workers cannot load the model.
    """
    crew = _Crew(cells, job, source)
    try:
        for placement in placements[: len(cells)]:
            crew.add_worker(placement)
        while crew.workers:
            for worker in _wait_any(crew.workers):
                yield from crew.hear(worker)
    finally:
        for worker in crew.workers:
            worker.kill()


class _Crew:
    """The workers, each with its current cell, and the backlog of cells."""

    def __init__(self, cells: Sequence[Cell], job: Callable[[Cell], Job], source: Source) -> None:
        self.workers: dict[Worker, Cell | None] = {}
        self._loaded: set[Worker] = set()
        self._backlog = deque(cells)
        self._job, self._source = job, source
        self._deaths: Counter[str] = Counter()
        self._failed_starts = 0

    def add_worker(self, placement: Placement) -> None:
        """Start a worker."""
        self.workers[Worker(self._source, placement)] = None

    def hear(self, worker: Worker) -> Iterator[Event]:
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
            self._give_next(worker)
        else:
            yield message.record
            if message.intact:
                self._give_next(worker)
            else:
                yield from self._replace(worker)

    def _give_next(self, worker: Worker) -> None:
        if self._backlog:
            cell = self.workers[worker] = self._backlog.popleft()
            worker.give(self._job(cell))
        else:
            self._retire(worker)

    def _replace(self, worker: Worker) -> Iterator[Event]:
        """Replace a worker whose model was changed by a method."""
        self._retire(worker)
        if self._backlog:
            yield "a method did not restore the model; a new worker loads it again"
            self.add_worker(worker.placement)

    def _on_exit(self, worker: Worker) -> Iterator[Event]:
        cell, why = self.workers.pop(worker), worker.end_in_words()
        if cell is not None:
            yield self._lost(cell, why)
        elif worker not in self._loaded:
            self._failed_starts += 1
            if self.workers:
                yield f"a worker {why} while it loaded the model; {len(self.workers)} continue"
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
            return Record(cell, error=error, finished=now(), versions=library_versions())
        self._backlog.appendleft(cell)
        return f"the worker that ran {cell.row} on {cell.task}, seed {cell.seed}, {why}; the cell runs again"

    def _retire(self, worker: Worker) -> None:
        del self.workers[worker]
        worker.kill()


class Worker:
    """Handle of a process that runs cells."""

    def __init__(self, source: Source, placement: Placement) -> None:
        self.placement = placement
        self.connection, theirs = _SPAWN.Pipe()
        # A daemon ends with its parent, also after an error.
        self.process = _SPAWN.Process(target=_work, args=(theirs, source, placement), daemon=True)
        with _interrupts_ignored():
            self.process.start()
        theirs.close()

    def receive(self) -> Ready | Refused | Outcome | None:
        """Its next message; None if it has died."""
        try:
            return self.connection.recv() if self.connection.poll() else None
        except (EOFError, OSError):
            return None

    def give(self, job: Job) -> None:
        """Send it a cell; if it has died, `receive` returns None."""
        with suppress(OSError):
            self.connection.send(job)

    def end_in_words(self) -> str:
        """How it died, as part of a sentence."""
        self.process.join(timeout=1)
        self.kill()
        code = self.process.exitcode or 0
        if code >= 0:
            return f"ended with status {code}"
        return f"was killed by signal {-code}" + (" (is there too little memory?)" if code == -9 else "")

    def kill(self) -> None:
        """Kill it; it has no state to save."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def load(source: Source, placement: Placement) -> CellRunner:
    """Load the model, once for all cells of this process.

    Raises:
        Refused: it cannot be loaded.
    """
    import torch

    from ofa.comparison.cell import CellRunner
    from ofa.models.load import load_model

    torch.set_num_threads(placement.threads)
    try:
        return CellRunner(load_model(device=placement.device, **source.arguments), source.batch_size)
    except InputError as error:
        raise Refused(str(error)) from error
    except Exception as error:
        raise Refused(f"the model cannot be loaded ({in_words(error)})") from error


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started here ignore Ctrl-C at the terminal; their parent handles it and ends them."""
    resource_tracker.ensure_running()  # the first start would do this, and then unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait_any(workers: Iterable[Worker]) -> list[Worker]:
    """Wait until some workers have a message or have died, and return them."""
    signals = {signal: worker for worker in workers for signal in (worker.connection, worker.process.sentinel)}
    return list(dict.fromkeys(signals[signal] for signal in wait(list(signals))))  # type: ignore[index]


def _work(connection: Connection, source: Source, placement: Placement) -> None:
    """Main function of a worker process: load the model, then run the cells it receives."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(2, 1)  # standard output is for results
    quiet_libraries()  # a spawned process has none of its parent's logging
    # Before torch is imported, which reads them.
    if placement.visible_gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = placement.visible_gpus
    os.environ["OMP_NUM_THREADS"] = str(placement.threads)
    try:
        runner = load(source, placement)
    except Refused as error:
        connection.send(error)
        return
    connection.send(Ready(runner.versions))
    intact = True
    while intact:
        outcome = runner.run(connection.recv())
        connection.send(outcome)
        intact = outcome.intact


def _end_with_parent() -> None:
    """Exit when the parent was killed, since the results would be lost."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
