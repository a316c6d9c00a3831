"""Read examples and tasks from the user's files, and from folders with a task.json."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.resources.abc import Traversable
from pathlib import Path

from ofa.errors import InputError
from ofa.tasks.columns import Columns, are_numbers, sorted_labels, unknown_label
from ofa.tasks.duplicates import warn_of_alike_labels, warn_of_duplicates, warn_of_shared_texts
from ofa.tasks.memory import Data, is_path, table_of
from ofa.tasks.tables import SUFFIXES, FilePath, Row, located, parse_json, read_text
from ofa.tasks.task import TEXT_SLOT, Example, Task, TaskData

logger = logging.getLogger(__name__)


def read_examples(path: Data, *, task: Task | None = None, separator: str | None = None) -> list[Example]:
    """Read the examples of a file that `Table` can read, or of rows in memory, in their order.

    The columns are those of the `task`, and every label must be one of its labels. Without a task they are text and
    label. Other columns are ignored, whitespace around a text is stripped, and rows without any value are dropped.
    Raises `InputError`, with file and line, for data that cannot be used.
    """
    columns = task.columns if task else draft(TEXT_SLOT, False).columns
    table = table_of(path, columns, separator)
    where = path if is_path(path) else str(table)
    return _checked(examples_of(table, columns, task.labels if task else (), table.class_names), columns, where)


def read_file(
    path: Data,
    *,
    template: str | None = None,
    labels: Sequence[str] = (),
    text_column: str = "",
    label_column: str = "",
    separator: str | None = None,
) -> TaskData:
    """Read a file, or rows in memory, as a task with training examples only, named after the file (rows: "data").

    Without a template they are prompt and completion pairs. The default labels are those that occur. Raises
    `InputError` for data that cannot be used.
    """
    name = (Path(located(path).name).name.split(".")[0] if is_path(path) else "") or "data"  # type: ignore[arg-type]
    if template is None:
        return _read_pairs(path, Task(name, TEXT_SLOT, (), text_column, label_column), separator)
    columns = draft(template, False, text_column, label_column).columns
    table = table_of(path, columns, separator)
    where = path if is_path(path) else str(table)
    words = tuple(labels) or class_names_of(columns.label_column, table.class_names)
    examples = _checked(examples_of(table, columns, words, table.class_names), columns, where)
    found = words or sorted_labels(example.label for example in examples)
    if not words:
        warn_of_alike_labels(examples, where)
    if not words and are_numbers(found):
        warn_of_number_labels(where, found)
    return TaskData(Task(name, template, found, text_column, label_column), tuple(examples))


def read_task_folder(
    path: FilePath, *, text_column: str = "", label_column: str = "", separator: str | None = None
) -> TaskData:
    """Read a folder with task.json (name, template, labels) and a file of each split, such as train.jsonl and test.csv.

    The test file is optional. Columns given here override those of task.json. Raises `InputError`, with file and line,
    for data that cannot be used.
    """
    folder = located(path)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give a folder that holds task.json and train.jsonl or train.csv")
    task = with_columns(_read_task(folder.joinpath("task.json")), text_column, label_column)
    train = _split_file(folder, "train")
    if train is None:
        raise InputError(f"{folder} has no train.jsonl or train.csv: add the training examples there")
    test = _split_file(folder, "test")
    data = TaskData(
        task=task,
        train=tuple(read_examples(train, task=task, separator=separator)),
        test=tuple(read_examples(test, task=task, separator=separator)) if test is not None else (),
    )
    warn_of_shared_texts(data.train, data.test, folder)
    return data


def examples_of(
    rows: Iterable[tuple[str, Row]],
    columns: Columns,
    labels: Sequence[str] = (),
    class_names: Mapping[str, Sequence[str]] | None = None,
) -> list[Example]:
    """The examples of rows, given as (where it stands, values); `class_names` are the names of a column's integers.

    Rows without any value are dropped. Raises `InputError` for a row that cannot be used.
    """
    names = class_names_of(columns.label_column, class_names or {})
    return [
        Example(columns.text(row, where), columns.label(row, where, labels, names))
        for where, row in rows
        if not _is_empty(row)
    ]


def draft(template: str, pairs: bool, text_column: str = "", label_column: str = "") -> Task:
    """A task whose labels are not known yet; used for its columns."""
    return Task("data", template, () if pairs else ("0", "1"), text_column, label_column)


def class_names_of(column: str, class_names: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The names of the integers of a column, matched in any case; empty if the data has none."""
    folded = {name.strip().casefold(): names for name, names in class_names.items()}
    return tuple(class_names.get(column, folded.get(column.strip().casefold(), ())))


def with_columns(task: Task, text_column: str = "", label_column: str = "") -> Task:
    """The task with its columns replaced by those given."""
    return replace(task, text_column=text_column or task.text_column, label_column=label_column or task.label_column)


def check_labels(examples: Sequence[Example], task: Task, where: str) -> None:
    """Raise `InputError` for the first example whose label the task does not have; `where` names their source.

    Examples are counted from 1. An open-ended task accepts every completion.
    """
    if task.open_ended:
        return
    for number, example in enumerate(examples, start=1):
        if example.label not in task.labels:
            raise unknown_label(example.label, task.labels, f"example {number} of {where}")


def warn_of_number_labels(where: object, labels: Sequence[str]) -> None:
    """Suggest --labels: a pretrained model predicts meaningful words better than numbers."""
    shown = ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "")
    logger.warning("the labels of %s are numbers (%s): --labels gives words for them, in their order", where, shown)


def _read_pairs(path: Data, task: Task, separator: str | None) -> TaskData:
    try:
        return TaskData(task, tuple(read_examples(path, task=task, separator=separator)))
    except InputError as error:
        what = path if is_path(path) else "the data"
        raise InputError(
            f"{what} was read as prompt and completion pairs because there is no --template, and {error}; "
            "for labelled texts give --template"
        ) from error


def _checked(examples: list[Example], columns: Columns, where: object) -> list[Example]:
    if not examples:
        wanted = " and ".join([*columns.names, columns.label_column])
        raise InputError(f"{where} has no examples: add rows with {wanted}")
    warn_of_duplicates(examples, where, pairs=columns.pairs)
    return examples


def _is_empty(row: Row) -> bool:
    return all(value is None or (isinstance(value, str) and not value.strip()) for value in row.values())


def _read_task(file: Traversable) -> Task:
    if not file.is_file():
        raise InputError(f'{file} does not exist: write it with the keys "name", "template" and "labels"')
    values = parse_json(read_text(file), file)
    try:
        return Task.from_dict(values)  # type: ignore[arg-type]
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _split_file(folder: Traversable, split: str) -> Traversable | None:
    names = [split + suffix + packed for suffix in SUFFIXES for packed in ("", ".gz")]
    found = [file for name in names if (file := folder.joinpath(name)).is_file()]
    if len(found) > 1:
        raise InputError(f"{folder} has both {' and '.join(file.name for file in found)}: keep one of them")
    return found[0] if found else None
