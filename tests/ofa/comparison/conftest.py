"""Two small tasks as folders, and plans and methods made for a test."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from ofa.comparison.grid import Grid, checked_part
from ofa.comparison.placement import Placement
from ofa.comparison.plan import Job, Plan, read_tasks
from ofa.comparison.records import Cell, Record
from ofa.comparison.workers import Event, Ready, Source, load
from ofa.methods import METHODS

TASKS = {
    "mood": ("Review: {text}\nSentiment:", ("negative", "positive")),
    "kind": ("Question: {text}\nAnswer Type:", ("Person", "Number", "Place")),
}
WORDS = ("warm", "dull", "sea", "team", "bank", "islands", "film", "novel")
QUICK = {"epochs": 2, "batch_size": 2, "learning_rate": 1e-2}


def write_task(folder: Path, name: str, train: int = 8, test: int = 6) -> Path:
    """A task folder with so many training and test examples of each class."""
    template, labels = TASKS[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps({"name": name, "template": template, "labels": labels}))
    for split, count in (("train", train), ("test", test)):
        rows = [
            {"text": f"{split} {WORDS[index % 8]} {label[0]} {index}", "label": label}
            for index in range(count)
            for label in labels
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Task folders by name. Shared by the whole session: read them, never write into them."""
    folder = tmp_path_factory.mktemp("tasks")
    return {name: str(write_task(folder / name, name)) for name in TASKS}


@pytest.fixture(scope="session")
def make_plan(tasks: dict[str, str]) -> Callable[..., Plan]:
    """Plans of grids over these tasks; what is not given is small."""

    def make(model: str = "a-model", **values: object) -> Plan:
        given = {"tasks": [tasks["mood"]], "methods": "zero-shot", "seeds": "1", "shots": 2, "test_size": 4, **values}
        grid = checked_part(Grid, given)
        return Plan(grid, model, read_tasks(grid))

    return make


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Adds a method for the length of a test: register(name, fit)."""

    def add(name: str, fit: Callable) -> None:
        module = ModuleType(f"method_{name}")
        module.fit = fit  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(METHODS, name, module.__name__)

    return add


# Runs


TIMES = ("seconds", "fit_seconds", "finished", "peak_memory_bytes")
BROKEN = {"learning_rate": 1e30, "epochs": 2}
"""Settings of a training that fails."""


def run_here(
    cells: Sequence[Cell], job: Callable[[Cell], Job], source: Source, placements: Sequence[Placement]
) -> Iterator[Event]:
    """Run cells in this process, as a worker does."""
    runner = load(source, placements[0])
    yield Ready(runner.versions)
    for cell in cells:
        yield runner.run(job(cell)).record


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command runs its cells in this process, without the seconds that another one takes to start."""
    monkeypatch.setattr("ofa.comparison.workers.run_in_workers", run_here)


def but_for_times(record: Record) -> dict:
    """What must be the same wherever a cell ran."""
    values = json.loads(record.to_line())
    for name in TIMES:
        values.pop(name)
    for score in values["scores"].values():
        score.pop("seconds_per_text")
    return values
