"""Expand a grid into cells: read tasks, draw shots, and refuse early what would fail later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ofa.comparison.arguments import check_settings, inputs_for
from ofa.comparison.grid import Grid
from ofa.comparison.records import Cell, Record
from ofa.errors import InputError
from ofa.files import at_home
from ofa.methods import DEMONSTRATING
from ofa.models.types import Tokenizer
from ofa.tasks import Example, FewShot, Task, TaskData, class_balanced, few_shot, is_known, load_task

TEST_SEED = 42
"""Seed of a task's test subset, which is the same for all methods and seeds."""


@dataclass(frozen=True)
class TaskPlan:
    """A task, its shots by seed, and the examples it is tested on."""

    data: TaskData
    sha256: str
    tested: tuple[Example, ...]
    drawn: Mapping[int, FewShot]

    @property
    def task(self) -> Task:
        """The task without its examples."""
        return self.data.task


@dataclass(frozen=True)
class Job:
    """The inputs of a worker, besides its model, for one cell.

    `inputs` are arguments of the method's `fit` besides the shots, the seed and the cell's settings.
    """

    cell: Cell
    task: Task
    shots: FewShot
    tested: tuple[Example, ...]
    inputs: Mapping[str, object]
    contexts: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The cells of a grid, in the order of their run, and the tasks they need.

    Cells are ordered by task, so that an interrupted comparison has complete results for some tasks.
    """

    grid: Grid
    model: str
    tasks: Mapping[str, TaskPlan]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The product of tasks, rows and seeds."""
        return tuple(
            Cell(
                model=self.model,
                task=name,
                task_sha256=plan.sha256,
                method=row.method,
                seed=seed,
                shots=self.grid.shots,
                test_size=self.grid.test_size,
                settings=row.settings,
            )
            for name, plan in self.tasks.items()
            for row in self.grid.methods
            for seed in self.grid.seeds
        )

    def job(self, cell: Cell) -> Job:
        """The inputs of a worker for a cell."""
        plan = self.tasks[cell.task]
        inputs = inputs_for(cell.method, plan.data.train)
        return Job(cell, plan.task, plan.drawn[cell.seed], plan.tested, inputs, self.grid.contexts)

    def missing(self, records: Sequence[Record], *, retry_failed: bool = False) -> tuple[Cell, ...]:
        """The cells without a record; with `retry_failed` also failed ones."""
        kept = {
            record.cell.key
            for record in records
            if (record.done or not retry_failed)
            and not set(record.notes.get("untested", ())) & set(self.grid.contexts)  # tested in every context
        }
        return tuple(cell for cell in self.cells if cell.key not in kept)

    def check_against(self, records: Sequence[Record]) -> None:
        """Check that the folder's results were made with the same tasks.

        Raises:
            InputError: a task of the same name had other examples, another template or other labels.
        """
        for record in records:
            plan = self.tasks.get(record.cell.task)
            if plan is not None and plan.sha256 != record.cell.task_sha256:
                raise InputError(
                    f'the results in the output folder are of another task "{record.cell.task}": its files have '
                    "changed since, or whether it is a chat; choose another output folder"
                )


def read_tasks(grid: Grid, *, offline: bool = False) -> dict[str, TaskPlan]:
    """Check the settings of all methods, read the tasks, and draw shots and test examples; by the tasks' own names.

    Raises:
        InputError: a task or a setting cannot be used, or a class has too few examples.
    """
    tasks: dict[str, TaskPlan] = {}
    for name in grid.tasks:
        plan = _task_plan(name, grid, offline)
        if plan.task.name in tasks:
            raise InputError(f'two tasks of the grid are called "{plan.task.name}": rename one in its task.json')
        tasks[plan.task.name] = plan
    for row in grid.methods:  # last, because it imports torch
        check_settings(row.method, row.settings)
    return tasks


def asked_chats(tasks: Mapping[str, TaskPlan], tokenizer: Tokenizer, grid: Grid) -> dict[str, TaskPlan]:
    """The tasks in the model's chat template if the grid asks for it, or by default.

    Raises:
        InputError: a method or a context of the grid puts demonstrations into the chat; or see
            `ofa.evaluation.chat.asked_chat`.
    """
    from ofa.evaluation.chat import asked_chat

    shown = _showing_demonstrations(grid)
    return {
        name: _with_task(plan, asked_chat(plan.task, tokenizer, grid.chat, grid.system, demonstrations=shown))
        for name, plan in tasks.items()
    }


def _with_task(plan: TaskPlan, task: Task) -> TaskPlan:
    data = replace(plan.data, task=task)
    return replace(plan, data=data, sha256=_digest(data))


def check_window(tasks: Mapping[str, TaskPlan], tokenizer: Tokenizer, window: int | None, grid: Grid) -> None:
    """Check that the demonstrations of every task and seed fit the model's window with the longest test prompt.

    As in `Encoder`, a prompt counts as at most half the window.

    Raises:
        InputError: they do not fit, and the grid has methods or contexts with demonstrations; or the labels of a task
            cannot be told apart under this tokenizer.
    """
    from ofa.evaluation.encoding import Encoder

    shown = _showing_demonstrations(grid)
    for name, plan in tasks.items():
        encoder = Encoder(tokenizer, plan.task, None)
        if window is None or not shown:
            continue
        longest = max(map(len, encoder.encode_prompts([example.text for example in plan.tested])))
        room = window - min(longest, window // 2) - max(map(len, encoder.labels.values()))
        for seed, shots in plan.drawn.items():
            taken = len(encoder.encode_demonstrations(shots.examples))
            if taken > room:
                raise InputError(
                    f"the demonstrations of {name} with seed {seed} take {taken} tokens and its longest prompt "
                    f"{longest}, but the model's window is {window}: ask for fewer --shots, or leave out "
                    f"{', '.join(shown)}"
                )


def _showing_demonstrations(grid: Grid) -> list[str]:
    """What puts demonstrations in front of a prompt."""
    shown = [f"the method {row.method}" for row in grid.methods if row.method in DEMONSTRATING]
    shown += ["demonstrated_steps"] if any(row.settings.get("demonstrated_steps") for row in grid.methods) else []
    return shown + (["the context demonstrations"] if "demonstrations" in grid.contexts else [])


def _task_plan(name: str, grid: Grid, offline: bool) -> TaskPlan:
    place = _folder_of(name)
    columns = {"text_column": grid.text_column, "label_column": grid.label_column}
    own = {} if is_known(place) else {option: column for option, column in columns.items() if column}
    data = load_task(place, **own, separator=grid.separator, offline=offline)
    task = data.task
    if task.open_ended:
        raise InputError(f'the task "{task.name}" has no labels to choose from: compare needs label words in task.json')
    if not data.test:
        raise InputError(
            f'the task "{task.name}" has no test examples: add test.jsonl or test.csv beside its task.json'
        )
    try:
        drawn = {seed: few_shot(data.train, task.labels, grid.shots, seed) for seed in grid.seeds}
    except InputError as error:
        raise InputError(f'in the task "{task.name}", {error}') from error
    return TaskPlan(data, _digest(data), class_balanced(data.test, task.labels, grid.test_size, TEST_SEED), drawn)


def _folder_of(name: str) -> str:
    """The task folder of a file in one; any other name unchanged."""
    path = at_home(name)
    if path.is_file() and (path.parent / "task.json").is_file():
        return str(path.parent)
    return name


def _digest(data: TaskData) -> str:
    rows = [[[example.text, example.label] for example in part] for part in (data.train, data.test)]
    return hashlib.sha256(json.dumps([data.task.to_dict(), *rows]).encode()).hexdigest()
