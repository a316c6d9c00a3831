"""From what is given as `--data` to a task with examples."""

from __future__ import annotations

from pathlib import Path

from ofa.errors import InputError
from ofa.tasks import (
    DEMO_TASKS,
    HUB_TASKS,
    Example,
    Task,
    TaskData,
    check_labels,
    load_hub_dataset,
    load_task,
    read_examples,
    unescape_template,
)

_FILES = (".jsonl", ".csv", ".json")


def split_labels(labels: str | None) -> tuple[str, ...]:
    """`"a, b"` → ("a", "b"); nothing for None."""
    return tuple(label.strip() for label in labels.split(",") if label.strip()) if labels else ()


def training_data(data: str, template: str | None, labels: str | None, *, offline: bool) -> TaskData:
    """The task and training examples of a file, a folder with task.json, a known task's name, or a hub id.

    A file or hub data set with a template is a classification task; a file of prompt and completion pairs needs none.

    Raises:
        InputError: the data cannot be read, or the template or labels do not fit it.
    """
    words = split_labels(labels)
    if _is_known(data):
        if template or words:
            raise InputError(f"{data} brings its own template and labels; leave out --template and --labels")
        return load_task(data, offline=offline)
    if not _is_file(data):
        if template is None:
            raise InputError(f"{data} is no file or folder; for a data set of the hub give --template too")
        return load_hub_dataset(data, template=unescape_template(template), label_words=words, offline=offline)
    if template is None:
        return TaskData(Task(Path(data).stem), tuple(_pairs(data)))
    examples = tuple(read_examples(data))
    found = words or tuple(sorted({example.label for example in examples}))
    task = Task(Path(data).stem, unescape_template(template), found)
    check_labels(examples, task, data)
    return TaskData(task, examples)


def test_data(data: str, task: Task, *, offline: bool) -> tuple[Example, ...]:
    """The examples to evaluate a known task on: a file, or the test part of a folder or a known task.

    Raises:
        InputError: the data cannot be read, has labels the task does not know, or has no test part.
    """
    if _is_known(data):
        loaded = load_task(data, offline=offline)
        if not loaded.test:
            raise InputError(f"{data} has no test examples; add a test file to it")
        check_labels(loaded.test, task, data)
        return loaded.test
    if not _is_file(data):
        raise InputError(f"{data} is no file or folder; give a .jsonl or .csv file, or a folder with task.json")
    return tuple(read_examples(data, open_ended=task.open_ended, task=task))


def demonstration_pool(data: str, task: Task, *, offline: bool) -> tuple[Example, ...]:
    """The training examples to draw demonstrations of a known task from.

    Raises:
        InputError: the data cannot be read, or has labels the task does not know.
    """
    if not _is_known(data):
        return test_data(data, task, offline=offline)
    loaded = load_task(data, offline=offline)
    check_labels(loaded.train, task, data)
    return loaded.train


def data_origin(data: str) -> dict[str, str]:
    """What an adapter says of its data: a name, and where it is from; no path, which means nothing elsewhere."""
    if data in DEMO_TASKS:
        return {"name": data, "origin": "a demo task of ofa"}
    if data in HUB_TASKS:
        return {"name": data, "hub_id": HUB_TASKS[data].hub_id}
    if Path(data).is_dir() or _is_file(data):
        return {"name": Path(data).resolve().name, "origin": "local data"}
    return {"name": data, "hub_id": data}


def _pairs(data: str) -> list[Example]:
    try:
        return read_examples(data, open_ended=True)
    except InputError as error:
        raise InputError(
            f"{data} was read as prompt and completion pairs because there is no --template, and {error}; "
            "for labelled texts give --template"
        ) from error


def _is_known(data: str) -> bool:
    return data in DEMO_TASKS or data in HUB_TASKS or Path(data).is_dir()


def _is_file(data: str) -> bool:
    return Path(data).is_file() or data.endswith(_FILES)
