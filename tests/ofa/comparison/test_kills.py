"""Workers as real processes: if they or their parent are killed, no finished cell is lost or changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest

from ofa.comparison.store import RESULTS, read_records
from tests.ofa.comparison.conftest import BROKEN, QUICK, but_for_times
from tests.ofa.comparison.test_command import run

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "40"}
METHODS = {"zero-shot": None, "icl": None, "norm-tuning": [{**QUICK, "epochs": 12}, BROKEN]}
PATIENCE = 60.0
"""Seconds for what takes a second or two on a machine with nothing else to do."""


@pytest.fixture
def grid(tiny_folder, tasks, tmp_path) -> list[str]:
    """Options of a run of sixteen cells, four of which fail."""
    values = {
        "model": str(tiny_folder),
        "tasks": [tasks["mood"]],
        "methods": METHODS,
        "seeds": "1-4",
        "shots": 2,
        "test_size": 4,
    }
    file = tmp_path / "grid.yaml"
    file.write_text(json.dumps(values))
    return ["--config", str(file)]


class Running:
    """Run the command in a process and process group of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ofa", "compare", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            start_new_session=True,
            # Shells start background jobs, such as this pytest, with SIGINT ignored.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        self.lines: list[str] = []

    def wait_for(self, words: str, count: int = 1) -> None:
        """Read what it says until these words came `count` times."""
        assert self.process.stderr is not None
        while count:
            line = self.process.stderr.readline()
            assert line, self.lines
            self.lines.append(line.rstrip())
            count -= words in line

    @property
    def workers(self) -> list[psutil.Process]:
        return [one for one in psutil.Process(self.process.pid).children() if "spawn_main" in " ".join(one.cmdline())]


def ended(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE)
    return not alive


@pytest.mark.usefixtures("here")
def test_kills_of_a_worker_and_of_the_parent_lose_nothing_that_was_finished(grid, tmp_path):
    """A killed worker's cell runs again; then the parent is killed, and its workers end.

    The same command resumes, and every cell has the result of an unperturbed run.
    """
    out = tmp_path / "out"
    running = Running(*grid, "--out", str(out))
    running.wait_for(" in ")
    (worker,) = running.workers
    worker.kill()
    running.wait_for("was killed by signal 9 (is there too little memory?); the cell runs again")
    running.wait_for(" in ", count=2)
    (worker,) = running.workers
    running.process.kill()
    running.process.wait()
    assert ended([worker]), "nobody would keep what comes out"
    finished = (out / RESULTS).read_bytes()
    assert 3 <= finished.count(b"\n") < 16
    assert finished.endswith(b"\n")

    told = run(*grid, "--out", out, "--json")
    lines = finished.count(b"\n")
    assert told.told[0] == f"{lines} of 16 cells are there, {16 - lines} to run"
    assert (out / RESULTS).read_bytes().startswith(finished)
    assert (told.json["done"], told.json["failed"]) == (12, 4)
    run(*grid, "--out", tmp_path / "unperturbed")
    results = [{r.cell.key: but_for_times(r) for r in read_records(tmp_path / name)} for name in ("out", "unperturbed")]
    assert results[0] == results[1]


def test_ctrl_c_ends_the_workers_and_says_how_to_go_on(grid, tmp_path):
    """Sent to all foreground processes, as by a terminal."""
    running = Running(*grid, "--out", str(tmp_path / "out"))
    running.wait_for("cells are there")
    while not running.workers:
        time.sleep(0.05)
    workers = running.workers
    os.killpg(running.process.pid, signal.SIGINT)
    _, error = running.process.communicate(timeout=PATIENCE)
    assert running.process.returncode == 130, error
    assert error == "ofa: stopped with 16 cells to run; the same command continues\n"
    assert ended(workers)
