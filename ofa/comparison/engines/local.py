"""Run workers as processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from ofa.comparison.engines import Event, Placement, Ready, Source
from ofa.comparison.engines.crew import run_crew
from ofa.comparison.engines.worker import Refused, load, place
from ofa.comparison.records import Cell

if TYPE_CHECKING:
    from ofa.comparison.cell import Outcome
    from ofa.comparison.plan import Job

_SPAWN = multiprocessing.get_context("spawn")  # a forked process would share threads and GPU state with its parent


class LocalEngine:
    """One process for each placement. See `Engine`."""

    def __init__(self, source: Source, placements: Sequence[Placement]) -> None:
        self._source = source
        self._placements = tuple(placements)

    @property
    def workers(self) -> int:
        """The number of cells that run at the same time."""
        return len(self._placements)

    def run(self, cells: Sequence[Cell], job: Callable[[Cell], Job]) -> Iterator[Event]:
        """Run every cell; see `Engine.run`."""
        return run_crew(cells, job, self._placements, lambda place: _Process(self._source, place), _wait_any)


class _Process:
    """Handle of a worker process."""

    def __init__(self, source: Source, placement: Placement) -> None:
        self.placement = placement
        self.connection, theirs = _SPAWN.Pipe()
        # A daemon ends with its parent, also after an error.
        self.process = _SPAWN.Process(target=_work, args=(theirs, source, placement), daemon=True)
        with _interrupts_ignored():
            self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    def receive(self) -> Ready | Refused | Outcome | None:
        try:
            return self.connection.recv() if self.connection.poll() else None
        except (EOFError, OSError):
            return None

    def give(self, job: Job) -> None:
        with suppress(OSError):
            self.connection.send(job)

    def end_in_words(self) -> str:
        self.process.join(timeout=1)
        self.kill()
        code = self.process.exitcode or 0
        if code >= 0:
            return f"ended with status {code}"
        return f"was killed by signal {-code}" + (" (is there too little memory?)" if code == -9 else "")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started here ignore Ctrl-C at the terminal; their parent handles it and ends them."""
    resource_tracker.ensure_running()  # the first start would do this, and then unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait_any(processes: list[_Process]) -> list[_Process]:
    signals = {signal: one for one in processes for signal in (one.connection, one.process.sentinel)}
    return list(dict.fromkeys(signals[signal] for signal in wait(list(signals))))  # type: ignore[index]


def _work(connection: Connection, source: Source, placement: Placement) -> None:
    """Main function of a worker process: load the model, then run the cells it receives."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(2, 1)  # standard output is for results
    place(placement)
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
