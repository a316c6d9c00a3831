"""The embedded demo tasks: sentences written for this project, available offline."""

from __future__ import annotations

from importlib.resources import files

from ofa.errors import InputError
from ofa.tasks.columns import did_you_mean
from ofa.tasks.local import read_task_folder
from ofa.tasks.task import TaskData

DEMO_TASKS = ("reviews", "tickets", "questions")


def load_demo_task(name: str) -> TaskData:
    """Read one of `DEMO_TASKS` from the package; raises `InputError` for another name."""
    if name not in DEMO_TASKS:
        hint = did_you_mean(name, DEMO_TASKS)
        raise InputError(f'there is no demo task "{name}" (there are {", ".join(DEMO_TASKS)}){hint}')
    return read_task_folder(files("ofa.tasks").joinpath("demo_data", name))
