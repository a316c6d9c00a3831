"""Tasks: a template and label words, with examples from the package, the hub or the user's files."""

from __future__ import annotations

import os
from pathlib import Path

from ofa.errors import InputError
from ofa.tasks.demo import DEMO_TASKS, load_demo_task
from ofa.tasks.hub import HUB_TASKS, HubTask, load_hub_dataset, load_hub_task
from ofa.tasks.local import check_labels, did_you_mean, read_examples, read_task_folder
from ofa.tasks.sampling import FewShot, class_balanced, few_shot
from ofa.tasks.task import Example, Task, TaskData, unescape_template

__all__ = [
    "DEMO_TASKS",
    "HUB_TASKS",
    "Example",
    "FewShot",
    "HubTask",
    "Task",
    "TaskData",
    "check_labels",
    "class_balanced",
    "did_you_mean",
    "few_shot",
    "load_demo_task",
    "load_hub_dataset",
    "load_hub_task",
    "load_task",
    "read_examples",
    "read_task_folder",
    "unescape_template",
]


def load_task(name_or_path: str | os.PathLike[str], *, offline: bool = False) -> TaskData:
    """Load a demo task or a task of the paper by name, or a folder with task.json by path.

    A name wins over a folder of the same name, which can be given as ./name. With `offline` the hub is not asked for
    a task of the paper. Raises `InputError` for anything else.
    """
    name = os.fspath(name_or_path)
    if name in DEMO_TASKS:
        return load_demo_task(name)
    if name in HUB_TASKS:
        return load_hub_task(name, offline=offline)
    path = Path(name)
    if path.is_dir():
        return read_task_folder(path)
    if path.is_file():
        raise InputError(f"{path} is a file: give its folder, with task.json beside train.jsonl or train.csv")
    known = (*DEMO_TASKS, *HUB_TASKS)
    hint = did_you_mean(name, known) or ": use one of these names or the path of a folder with task.json"
    raise InputError(f'there is no task or folder "{name}" (tasks: {", ".join(known)}){hint}')
