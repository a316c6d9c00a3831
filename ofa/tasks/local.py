"""Examples and tasks from the user's own files: JSON lines or CSV, and folders with a task.json."""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
from collections.abc import Iterator, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path

from ofa.errors import InputError
from ofa.tasks.task import Example, Task, TaskData

JSON_SUFFIXES = (".jsonl", ".json-lines")
SUFFIXES = (*JSON_SUFFIXES, ".csv")
PAIR_COLUMNS = ("prompt", "completion")
LABELLED_COLUMNS = ("text", "label")

FilePath = str | os.PathLike[str] | Traversable


def read_examples(path: FilePath, *, open_ended: bool = False, task: Task | None = None) -> list[Example]:
    """Read the examples of a .jsonl, .json-lines or .csv file in UTF-8, in file order.

    The columns are text and label, without the whitespace around a value, or prompt and completion as they are written
    when `open_ended`; others are ignored. With a `task`, its kind decides the columns and every label must be one of
    its labels.
    Raises `InputError`, naming the file and the line, for whatever cannot be used.
    """
    pairs = task.open_ended if task else open_ended
    labels = task.labels if task else ()
    columns = PAIR_COLUMNS if pairs else LABELLED_COLUMNS
    is_csv = _suffix(path) == ".csv"
    examples = []
    for where, row in read_rows(path):
        text, label = (_cell(row, column, columns, where) for column in columns)
        number = None if pairs else _number(label, labels, is_csv)
        if number is not None:
            raise InputError(
                f'{where}: the label {number} is a number: write the name of the label, such as "positive"'
            )
        example = Example(_text(text, columns[0], where), _text(label, columns[1], where))
        if not pairs:
            example = Example(example.text.strip(), example.label.strip())
        if labels and example.label not in labels:
            raise _unknown_label(example.label, labels, where)
        examples.append(example)
    if not examples:
        raise InputError(f"{path} has no examples: add rows with {columns[0]} and {columns[1]}")
    return examples


def read_task_folder(path: FilePath) -> TaskData:
    """Read a folder with task.json (name, template, labels), train.jsonl or .csv, and test.jsonl or .csv.

    The test file may be missing. Raises `InputError`, naming the file and the line, for whatever cannot be used.
    """
    folder = _located(path)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give a folder that holds task.json and train.jsonl or train.csv")
    task = _read_task(folder.joinpath("task.json"))
    train = _split_file(folder, "train")
    if train is None:
        raise InputError(f"{folder} has no train.jsonl or train.csv: add the training examples there")
    test = _split_file(folder, "test")
    return TaskData(
        task=task,
        train=tuple(read_examples(train, task=task)),
        test=tuple(read_examples(test, task=task)) if test is not None else (),
    )


def check_labels(examples: Sequence[Example], task: Task, where: str) -> None:
    """Raise `InputError` for the first example whose label the task does not know; `where` names their source.

    Examples are counted from 1. An open-ended task knows every completion.
    """
    if task.open_ended:
        return
    for number, example in enumerate(examples, start=1):
        if example.label not in task.labels:
            raise _unknown_label(example.label, task.labels, f"example {number} of {where}")


def read_rows(path: FilePath) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield each row of a JSON-lines or CSV file as (where it stands, values by column); blank lines are skipped."""
    file = _located(path)
    suffix = _suffix(file)
    if suffix not in SUFFIXES:
        raise InputError(f'{file} has the unknown suffix "{suffix}": use {", ".join(SUFFIXES)}')
    content = _read_text(file)
    return _json_rows(content, file) if suffix in JSON_SUFFIXES else _csv_rows(content, file)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A clause that offers the known word nearest to a mistyped one, or nothing where none is near."""
    folded = {candidate.casefold(): candidate for candidate in known}
    near = difflib.get_close_matches(word.strip().casefold(), folded, n=1)
    return f', did you mean "{folded[near[0]]}"?' if near else ""


def _located(path: FilePath) -> Traversable:
    return Path(path) if isinstance(path, str | os.PathLike) else path


def _suffix(path: FilePath) -> str:
    return Path(_located(path).name).suffix.lower()


def _read_text(file: Traversable) -> str:
    if not file.is_file():
        raise InputError(f"{file} does not exist or is not a file: check the path")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): check its permissions") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file}, line {line} is not UTF-8 text: save the file with UTF-8 encoding") from error


def _json_rows(content: str, file: Traversable) -> Iterator[tuple[str, dict[str, object]]]:
    # Not splitlines(): a text may hold other Unicode line separators, which JSON does not escape.
    for line, record in enumerate(content.split("\n"), start=1):
        if record.strip():
            where = f"{file}, line {line}"
            row = _parse_json(record, file, first_line=line)
            if not isinstance(row, dict):
                raise InputError(f"{where} holds no JSON object: write one object with its columns per line")
            yield where, row


def _csv_rows(content: str, file: Traversable) -> Iterator[tuple[str, dict[str, object]]]:
    records = csv.reader(io.StringIO(content, newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for record in records:
            # The reader has passed the end of the record, which may span lines; the user looks for its beginning.
            where, line = f"{file}, line {line}", records.line_num + 1
            if not any(cell.strip() for cell in record):
                continue
            if header is None:
                header = [cell.strip() for cell in record]
                continue
            if len(record) != len(header):
                raise InputError(
                    f"{where} has {len(record)} cells but the header has {len(header)}: "
                    "put texts that contain commas in double quotes"
                )
            yield where, dict(zip(header, record, strict=True))
    except csv.Error as error:
        raise InputError(f"{file}, line {line} is broken CSV ({error}): check its quotes") from error


def _read_task(file: Traversable) -> Task:
    if not file.is_file():
        raise InputError(f'{file} does not exist: write it with the keys "name", "template" and "labels"')
    values = _parse_json(_read_text(file), file)
    try:
        return Task.from_dict(values)  # type: ignore[arg-type]
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _parse_json(content: str, file: Traversable, first_line: int = 1) -> object:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        where = f"{file}, line {first_line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{where} is broken JSON ({error.msg}): correct it") from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits or objects nested thousands deep: valid JSON that Python refuses to build.
        raise InputError(f"{file}, line {first_line} is JSON that cannot be read ({error}): simplify it") from error


def _split_file(folder: Traversable, split: str) -> Traversable | None:
    found = [file for suffix in SUFFIXES if (file := folder.joinpath(split + suffix)).is_file()]
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise InputError(f"{folder} has both {names}: keep one of them")
    return found[0] if found else None


def _cell(row: dict[str, object], column: str, columns: tuple[str, str], where: str) -> object:
    if column in row:
        return row[column]
    found = ", ".join(f'"{name}"' for name in row) or "none"
    raise InputError(f'{where} has no column "{column}" (columns found: {found}): name them {" and ".join(columns)}')


def _text(value: object, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f'{where}: the {column} is {_json(value)}, which is not text: write it as "..." in quotes')
    if not value.strip():
        raise InputError(f"{where}: the {column} is empty: fill it in or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: the {column} holds half of a surrogate pair: write the character itself") from error
    return value


def _number(value: object, task_labels: tuple[str, ...], is_csv: bool) -> str | None:
    """The number that stands where a label's name should be, if one does."""
    if isinstance(value, int | float):
        return _json(value)
    # A CSV cell has no type, so digits are a number there, unless the task itself has such a label word.
    if is_csv and isinstance(value, str) and value.strip() not in task_labels and value.strip().lstrip("+-").isdigit():
        return value.strip()
    return None


def _unknown_label(label: str, labels: tuple[str, ...], where: str) -> InputError:
    known = ", ".join(labels)
    hint = did_you_mean(label, labels) or ": correct the label or add it to the task"
    return InputError(f'{where}: the label "{label}" is not one of the labels of the task ({known}){hint}')


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
