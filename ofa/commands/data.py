"""Load the tasks and examples of `--data` and related options."""

from __future__ import annotations

import csv

from ofa.commands.options import DataOptions
from ofa.errors import InputError
from ofa.files import at_home
from ofa.tasks import (
    DEMO_TASKS,
    HUB_TASKS,
    Example,
    Task,
    TaskData,
    check_labels,
    examples_from,
    has_parts,
    is_known,
    is_table,
    load_task,
    unescape_template,
)


def split_labels(labels: str | None) -> tuple[str, ...]:
    """Split `'a, "b, c"'` into ("a", "b, c"), as a line of CSV; empty for None.

    Raises:
        InputError: a quote is left open.
    """
    if not labels:
        return ()
    try:
        rows = list(csv.reader([labels], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise InputError(
            f"the labels {labels} leave a quote open: separate them by commas, and put a label with a comma in double "
            "quotes"
        ) from error
    return tuple(label.strip() for row in rows for label in row if label.strip())


def training_data(data: str, how: DataOptions, *, offline: bool) -> TaskData:
    """Load a task with `load_task`, with template and labels as typed on the command line.

    Raises:
        InputError: the data cannot be read, or the template or labels do not fit it.
    """
    return load_task(
        data,
        template=None if how.template is None else unescape_template(how.template),
        labels=split_labels(how.labels),
        text_column=how.text_column or "",
        label_column=how.label_column or "",
        separator=how.separator,
        offline=offline,
    )


def demonstration_pool(data: str, task: Task, *, separator: str | None, offline: bool) -> tuple[Example, ...]:
    """The training examples to draw demonstrations of a known task from.

    Raises:
        InputError: the data cannot be read, or has labels that the task does not have.
    """
    if not has_parts(data):
        return examples_from(data, task, separator=separator, offline=offline)
    loaded = load_task(data, separator=separator, offline=offline)
    check_labels(loaded.train, task, data)
    return loaded.train


def data_origin(data: str) -> dict[str, str]:
    """An adapter's record of its data: name and origin, but no local path."""
    if is_known(data):
        in_package = data in DEMO_TASKS
        return {
            "name": data,
            **({"origin": "a demo task of ofa"} if in_package else {"hub_id": HUB_TASKS[data].hub_id}),
        }
    if at_home(data).exists() or is_table(data):
        return {"name": at_home(data).resolve().name, "origin": "local data"}
    return {"name": data, "hub_id": data}
