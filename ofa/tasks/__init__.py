"""Tasks: a template and label words, with examples from the package, the hub or the user's files."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from ofa.errors import InputError
from ofa.tasks.columns import did_you_mean
from ofa.tasks.demo import DEMO_TASKS, load_demo_task
from ofa.tasks.hub import HUB_TASKS, HubTask, load_hub_dataset, load_hub_task
from ofa.tasks.local import check_labels, read_examples, read_file, read_task_folder, with_columns
from ofa.tasks.sampling import FewShot, Shots, class_balanced, few_shot, unused
from ofa.tasks.tables import Table, is_table, located
from ofa.tasks.task import Example, Task, TaskData
from ofa.tasks.template import unescape_template

__all__ = [
    "DEMO_TASKS",
    "HUB_TASKS",
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
    "few_shot",
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
    name_or_path: str | os.PathLike[str],
    *,
    template: str | None = None,
    labels: Sequence[str] = (),
    text_column: str = "",
    label_column: str = "",
    separator: str | None = None,
    offline: bool = False,
) -> TaskData:
    """Load a demo task or a task of the paper by name, a folder with task.json, a file, or a data set of the hub.

    A folder with task.json wins over a task of its name, and that is said. A file takes a `template` and `labels`, and
    is read as pairs of prompt and completion without a template; a data set of the hub needs a template. `text_column`
    and `label_column` name columns of files and data sets, `separator` that of CSV files. With `offline` the hub is not
    asked. Raises `InputError` for anything else.
    """
    name = os.fspath(name_or_path)
    columns = {"text_column": text_column, "label_column": label_column}
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


def is_known(name: str) -> bool:
    """Whether a name is that of a demo task or a task of the paper, and not of a folder here with a task.json."""
    if name not in DEMO_TASKS and name not in HUB_TASKS:
        return False
    if not Path(name).is_dir():
        return True
    wins = (Path(name) / "task.json").is_file()
    _say_which(name, Path(name).absolute(), wins)
    return not wins


@functools.cache
def _say_which(name: str, folder: Path, wins: bool) -> None:
    kind = "demo task" if name in DEMO_TASKS else "task of the paper"
    if wins:
        logger.warning("%s is the folder %s, not the %s of that name", name, folder, kind)
    else:
        logger.warning("%s is the %s, not the folder %s, which has no task.json", name, kind, folder)
