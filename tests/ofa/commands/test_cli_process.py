"""The command line as a process: the time to start, the output at the terminal, the state after Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ofa.adapters.folder import CHECKPOINT
from tests.ofa.command_line import FIT_FILES, TEMPLATE, TEST, TRAIN, names, ofa, write_rows

COMMANDS = ("demo", "fit", "evaluate", "predict", "compare", "report", "probe", "merge", "inspect", "doctor")
HEAVY = "{'torch', 'transformers', 'datasets', 'matplotlib', 'peft'}"
# One thread: the matrices are too small to share. A narrow terminal by name must not break our lines.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "40"}
ENVIRONMENT.pop("FORCE_COLOR", None)
STEPS = 80


def python(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, **options)


def best_of_three(*arguments: object) -> float:
    """Wall-clock seconds of the fastest of three runs, the one least disturbed by other processes."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        python(*arguments, check=True)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [(["-c", "import ofa"], 2.0), (["-m", "ofa", "--help"], 3.0)],
    ids=["import ofa", "ofa --help"],
)
def test_starting_is_quick(arguments: list[str], limit: float) -> None:
    """A help text must not wait for torch; the time includes the interpreter's start."""
    assert best_of_three(*arguments) < limit


@pytest.mark.parametrize(
    "code",
    [
        "import ofa",
        "import ofa.cli",
        "import contextlib, ofa.cli\nwith contextlib.suppress(SystemExit): ofa.cli.app(['--help'])",
        "import contextlib, ofa.cli\nwith contextlib.suppress(SystemExit): ofa.cli.app(['fit', '--help'])",
    ],
    ids=["import ofa", "import ofa.cli", "--help", "fit --help"],
)
def test_starting_imports_nothing_heavy(code: str) -> None:
    """The cause of a quick start, tested independently of the machine's load."""
    done = python("-c", f"{code}\nimport sys\nprint({HEAVY} & set(sys.modules))", check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help(command: str) -> None:
    """--help of `ofa` and of each command exits 0, and prints only on standard output."""
    finished = ofa(*command.split(), "--help")
    assert (finished.status, finished.err) == (0, "")
    assert "Usage:" in finished.out
    assert all(name in finished.out for name in ([command] if command else COMMANDS))


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        (["fit", "--shot", "5"], "--shot"),
        (["fit", "--data", "d", "--out", "o", "--shots", "five"], "--shots"),
        (["evaluate"], "missing option '--data'"),
        (["predict"], "missing argument 'adapter'"),
        (["fti"], "did you mean 'fit'"),
    ],
    ids=["unknown option", "no number", "missing option", "missing argument", "unknown command"],
)
def test_wrong_options_are_one_sentence(arguments: list[str], about: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option parser's errors have the same form as all others."""
    monkeypatch.setenv("COLUMNS", "40")
    finished = ofa(*arguments)
    assert (finished.status, finished.out) == (2, "")
    (line,) = finished.err.splitlines()
    assert line.startswith("ofa: ")
    assert about in line.lower()
    assert "--help` lists the options" in line


def test_no_arguments_at_all_show_the_help() -> None:
    """Status 2, because nothing was done."""
    done = python("-m", "ofa")
    assert done.returncode == 2
    assert "Usage:" in done.stdout + done.stderr


@pytest.fixture
def arguments(tiny_folder: Path, tmp_path: Path) -> list[object]:
    train = write_rows(tmp_path / "train.jsonl", TRAIN)
    given = ["--data", train, "--template", TEMPLATE, "--model", tiny_folder, "--out", tmp_path / "out"]
    return ["-m", "ofa", "fit", *given, "--shots", 2, "--epochs", STEPS]


def test_interrupted_fit_leaves_a_checkpoint_and_resumes(arguments: list[object], tmp_path: Path) -> None:
    """A real Ctrl-C: one line, status 130, a checkpoint; --resume then finishes, with only its own output."""
    out = tmp_path / "out"
    running = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    metrics = out / "metrics.jsonl"
    while running.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    told, error = running.communicate(timeout=60)
    assert (running.returncode, told) == (130, "")
    step = int(error.removeprefix("ofa: stopped after step ").split(";")[0])
    assert 1 <= step < STEPS
    assert error == f"ofa: stopped after step {step}; --resume continues from {out / CHECKPOINT}\n"
    assert names(out) == {CHECKPOINT, "metrics.jsonl"}
    taken = metrics.read_text().splitlines()
    assert len(taken) == step

    finished = python(*arguments, "--resume", "--test", write_rows(tmp_path / "test.jsonl", TEST))
    assert (finished.returncode, finished.stdout) == (0, "accuracy 0.500 on the test examples\n")
    assert names(out) == FIT_FILES
    lines = metrics.read_text().splitlines()
    assert (len(lines), lines[:step]) == (STEPS, taken)
    # Whole lines of ours, and no library's bars, colours or advice: there is no terminal.
    # Lines of ofa's own are of a busy machine: how many threads it left, and how far a slow run is.
    said = [line for line in finished.stderr.splitlines() if not line.startswith("ofa: ")]
    assert [line.split(" ")[0] for line in said] == ["4", "adapter:", "try:"]
    assert not any(mark in finished.stderr for mark in ("\r", "\x1b", "%|", "█", "━", "Traceback"))


def test_a_pipe_that_closes_early_ends_it_quietly() -> None:
    """`ofa doctor --json | head -0`: no traceback when the reader closes the pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ofa", "doctor", "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
