"""Tasks: a template and label words, with examples from the package, the hub or the user's files."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ofa.errors import InputError
from ofa.tasks.columns import did_you_mean
from ofa.tasks.demo import DEMO_TASKS, load_demo_task
from ofa.tasks.hub import HUB_TASKS, HubTask, load_hub_dataset, load_hub_task
from ofa.tasks.local import check_labels, read_examples, read_file, read_task_folder, with_columns
from ofa.tasks.memory import Data, is_path, settled
from ofa.tasks.sampling import FewShot, Shots, class_balanced, few_shot, unused
from ofa.tasks.tables import Table, is_table, located
from ofa.tasks.task import Example, Task, TaskData
from ofa.tasks.template import unescape_template

__all__ = [
    "DEMO_TASKS",
    "HUB_TASKS",
    "Data",
    "Example",
    "FewShot",
    "HubTask",
    "Shots",
    "Table",
    "Task",
    "TaskData",
    "check_labels",
    "class_balanced",
    "did_you_mean",
    "examples_from",
    "few_shot",
    "has_parts",
    "is_known",
    "load_demo_task",
    "load_hub_dataset",
    "load_hub_task",
    "load_task",
    "read_examples",
    "read_file",
    "read_task_folder",
    "unescape_template",
    "unused",
    "with_columns",
]

logger = logging.getLogger(__name__)


def load_task(
    data: str | os.PathLike[str] | TaskData | Data,
    *,
    template: str | None = None,
    labels: Sequence[str] = (),
    text_column: str = "",
    label_column: str = "",
    separator: str | None = None,
    offline: bool = False,
) -> TaskData:
    """Load a demo task or a task of the paper by name, a folder with task.json, a file, a data set of the hub, or rows.

    Args:
        data: a name, path or hub id; or rows in memory: a DataFrame, a `datasets.Dataset`, a `DatasetDict` with splits
            train and test, or a list of (text, label) or of mappings. `TaskData` is returned unchanged. A folder with
            task.json takes precedence over a task of the same name, with a warning.
        template: required for data sets of the hub and lists of pairs; files and named rows without one are read as
            prompt and completion pairs.
        labels: the label words; by default those that occur.
        text_column, label_column: columns of files, data sets and rows.
        separator: the separator of CSV files; detected by default.
        offline: do not contact the hub.

    Returns:
        The task with its training and test examples.

    Raises:
        InputError: the data cannot be found, read or used, or brings a value that is given here too.

    Example:
        >>> data = ofa.load_task([("a joy", "good"), ("a bore", "bad")], template="Review: {text}\\nSentiment:")
        >>> data.task.labels
        ('bad', 'good')
        >>> ofa.load_task("tickets").task.labels  # an embedded task
        ('Billing', 'Account', 'Technical', 'Shipping')
    """
    columns = {"text_column": text_column, "label_column": label_column}
    if isinstance(data, TaskData):
        if template or labels or any(columns.values()):
            raise InputError("task data brings its own template, labels and columns: leave them out")
        return data
    if not is_path(data):
        return _in_memory(data, template, labels, **columns)
    name = os.fspath(data)  # type: ignore[arg-type]
    if is_known(name) or located(name).is_dir():
        if template or labels:
            raise InputError(f"{name} brings its own template and labels: leave out --template and --labels")
        if not is_known(name):
            return read_task_folder(name, **columns, separator=separator)
        if any(columns.values()):
            raise InputError(f"{name} brings its own columns: leave out --text-column and --label-column")
        return load_demo_task(name) if name in DEMO_TASKS else load_hub_task(name, offline=offline)
    if located(name).is_file() or is_table(name):
        return read_file(name, template=template, labels=labels, **columns, separator=separator)
    if template is not None:
        return load_hub_dataset(
            name,
            template=template,
            text_column=text_column,
            label_column=label_column,
            label_words=labels,
            offline=offline,
        )
    known = (*DEMO_TASKS, *HUB_TASKS)
    hint = did_you_mean(name, known) or ": use one of these names, a path, or a hub id with a template"
    raise InputError(f'there is no task or folder "{name}" (tasks: {", ".join(known)}){hint}')


def examples_from(
    data: TaskData | Data, task: Task, *, separator: str | None = None, offline: bool = False
) -> tuple[Example, ...]:
    """The examples to test a known task on: a file, rows in memory, or the test part of a folder or named task.

    Raises:
        InputError: they cannot be read, there is no test part, or they have labels that the task does not have.
    """
    if isinstance(data, TaskData) or has_parts(data):
        loaded = load_task(data, separator=separator, offline=offline)
        name = loaded.task.name if isinstance(data, TaskData) else str(data)
        if not loaded.test:
            raise InputError(f"{name} has no test examples: add a test file to it")
        check_labels(loaded.test, task, name)
        return loaded.test
    if is_path(data):
        if not (located(data).is_file() or is_table(data)):  # type: ignore[arg-type]
            raise InputError(f"{data} is no file or folder: give a .jsonl or .csv file, or a folder with task.json")
        return tuple(read_examples(data, task=task, separator=separator))
    given = settled(data)
    if isinstance(given, list) and all(isinstance(item, Example) for item in given):
        return tuple(given)
    return tuple(read_examples(given, task=task))


def has_parts(data: object) -> bool:
    """True if `data` is a name or folder with separate training and test examples."""
    return is_path(data) and (is_known(str(data)) or located(data).is_dir())  # type: ignore[arg-type]


def _in_memory(data: Any, template: str | None, labels: Sequence[str], **columns: str) -> TaskData:
    is_split = hasattr(data, "keys") and type(data).__module__.startswith("datasets")
    if is_split and "train" not in data:
        raise InputError(f"the data set has no split train (it has {', '.join(data)}): give one of them, as data[name]")
    train = settled(data["train"] if is_split else data)
    if template is None and isinstance(train, list) and train and isinstance(train[0], list | tuple | Example):
        raise InputError(
            'pairs of text and label need a template, such as template="{text}\\nLabel:"; prompts and completions need '
            'their names, as in {"prompt": …, "completion": …}'
        )
    loaded = read_file(train, template=template, labels=labels, **columns)
    test = examples_from(data["test"], loaded.task) if is_split and "test" in data else ()
    return TaskData(loaded.task, loaded.train, test)


def is_known(name: str) -> bool:
    """True if `name` is a demo task or a task of the paper, and not a folder here with a task.json."""
    if name not in DEMO_TASKS and name not in HUB_TASKS:
        return False
    if not Path(name).is_dir():
        return True
    wins = (Path(name) / "task.json").is_file()
    _warn_which(name, Path(name).absolute(), wins)
    return not wins


@functools.cache
def _warn_which(name: str, folder: Path, wins: bool) -> None:
    kind = "demo task" if name in DEMO_TASKS else "task of the paper"
    if wins:
        logger.warning("%s is the folder %s, not the %s of that name", name, folder, kind)
    else:
        logger.warning("%s is the %s, not the folder %s, which has no task.json", name, kind, folder)
