"""Rows with their predictions: what the columns are called, and a file of them that a stopped run continues."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from ofa.errors import InputError
from ofa.files import reason, write_json
from ofa.tasks.tables import Row, parse_json, read_text
from ofa.tasks.task import Task

SUFFIXES = (".csv", ".jsonl")


@dataclass(frozen=True)
class Survey:
    """What there is to predict: the number of rows, of those without text, and all columns in their order."""

    rows: int
    blank: int
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Naming:
    """What the predictions are called beside the input's columns: a name that is taken has predicted_ before it."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]

    def answer(self, row: Row, prediction: str | None, probabilities: Sequence[float] | None) -> Row:
        """A row of input with its prediction: label and probabilities, or the completion of an open-ended task."""
        if not self.labels:
            return {**row, self.completion: prediction}
        by_label = None if probabilities is None else dict(zip(self.labels, probabilities, strict=True))
        return {**row, self.label: prediction, self.probabilities: by_label}

    @cached_property
    def label(self) -> str:
        """The column of the predicted label."""
        return self._free("label")

    @cached_property
    def completion(self) -> str:
        """The column of an open-ended task's answers."""
        return self._free("completion")

    @cached_property
    def probabilities(self) -> str:
        """The name of the probabilities in JSON."""
        return self._free("probabilities")

    @cached_property
    def flat(self) -> tuple[str, ...]:
        """The columns of a CSV file: the input's, the label, and a probability for each label."""
        if not self.labels:
            return (*self.columns, self.completion)
        return (*self.columns, self.label, *(self._free(f"probability_{label}") for label in self.labels))

    def flattened(self, answer: Row) -> list[object]:
        """An answer as a row of that CSV file."""
        if not self.labels:
            return [_cell(answer.get(name)) for name in self.flat]
        by_label = answer[self.probabilities]
        numbers = by_label.values() if isinstance(by_label, Mapping) else [""] * len(self.labels)
        return [*(_cell(answer.get(name)) for name in (*self.columns, self.label)), *numbers]

    def _free(self, name: str) -> str:
        taken = {column.casefold() for column in self.columns}
        while name.casefold() in taken:
            name = f"predicted_{name}"
        return name


def check_out(path: Path) -> None:
    """Raise `InputError` for a name that does not say how predictions are written, or a folder that is not there."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path} is no file of predictions that can be written: end it in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"{path} cannot be written: give the name of a file in a folder that is there")


def survey(rows: Iterable[tuple[str, Row]], task: Task) -> Survey:
    """Read all rows once, so that nothing in the last of them stops a run of hours.

    Raises:
        InputError: a row cannot be read, or lacks a column that the task asks for.
    """
    columns: dict[str, None] = {}
    count = blank = 0
    for where, row in rows:
        count += 1
        blank += task.columns.text_or_none(row, where) is None
        if not columns.keys() >= row.keys():
            columns.update(dict.fromkeys(row))
    return Survey(count, blank, tuple(columns))


class PredictionFile:
    """A file of predictions that grows by whole parts in a hidden file beside it, and appears when it is complete.

    `rows` is how many rows are done. A second hidden file says how far the first is good, for which input rows, and
    what it is `made_with`.
    """

    def __init__(self, path: Path, naming: Naming, made_with: Mapping[str, Any]) -> None:
        self.path = path
        self.naming = naming
        self.made_with = json.loads(json.dumps(made_with))
        self.rows = 0
        self._partial = path.with_name(f".{path.name}.partial")
        self._state = path.with_name(f".{path.name}.partial.json")
        self._digest = hashlib.sha256()
        self._file: IO[bytes]

    @contextmanager
    def opened(self, *, resume: bool, overwrite: bool) -> Iterator[None]:
        """The file, to `append` to; it is put in place when the work inside ends well.

        Raises:
            InputError: there is such a file, or a part of one, and neither `resume` nor `overwrite` says what to do
                with it; it was begun with something else; another process is writing it; it cannot be written.
        """
        with _writing(self.path), _sole(self.path):
            state = self._continued(resume, overwrite)
            self.rows, self._expected = state["rows"], state["sha256"]
            with self._partial.open("ab") as self._file:
                self._file.truncate(state["bytes"])
                if not state["bytes"] and self.path.suffix.lower() == ".csv":
                    self._write([_line(self.naming.flat)])
                yield
            os.replace(self._partial, self.path)
            self._state.unlink()

    def remaining(self, rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        """The rows that are not done.

        Raises:
            InputError: those that were done are not the first of these.
        """
        left = iter(rows)
        for _, row in islice(left, self.rows):
            self._digest.update(_json(row))
        if self._digest.hexdigest() != self._expected:
            raise InputError(
                f"the data is not what {self.path} was begun with: give the same file, or --overwrite to begin again"
            )
        return left

    def append(self, rows: Sequence[Row], answers: Iterable[Row]) -> None:
        """Write the answers to the next rows; they are on the disk when this returns."""
        flat = self.path.suffix.lower() == ".csv"
        self._write(_line(self.naming.flattened(answer)) if flat else _json(answer) for answer in answers)
        for row in rows:
            self._digest.update(_json(row))
        self.rows += len(rows)
        state = {"rows": self.rows, "bytes": self._file.tell(), "sha256": self._digest.hexdigest()}
        write_json(self._state, {"made_with": self.made_with, **state})

    def _continued(self, resume: bool, overwrite: bool) -> dict[str, Any]:
        """How far an earlier run has come; nowhere if it is to be begun."""
        start = {"rows": 0, "bytes": 0, "sha256": hashlib.sha256().hexdigest()}
        if self.path.exists() and not overwrite:
            raise InputError(f"{self.path} is there already: choose another --out, or pass --overwrite")
        if overwrite or not self._state.exists():
            return start
        if not resume:
            raise InputError(f"{self.path} was begun by a run that was stopped: pass --resume, or --overwrite")
        state = _read_state(self._state)
        if state["made_with"] != self.made_with:
            other = next(name for name in self.made_with if state["made_with"].get(name) != self.made_with[name])
            raise InputError(
                f"{self.path} was begun with another {other}: resume with the same, or pass --overwrite to begin again"
            )
        if not self._partial.exists() or self._partial.stat().st_size < state["bytes"]:
            raise InputError(f"{self._partial} has lost its end: pass --overwrite to begin again")
        return state

    def _write(self, lines: Iterable[bytes]) -> None:
        self._file.writelines(lines)
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({reason(error)}): free its disk or choose another --out"
        ) from error


@contextmanager
def _sole(path: Path) -> Iterator[None]:
    """The right to write a file, for one process at a time."""
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        with lock:
            yield
            Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout as error:
        raise InputError(f"another process is writing {path} at this moment: choose another --out") from error


def _read_state(file: Path) -> dict[str, Any]:
    state = parse_json(read_text(file), file)
    if not isinstance(state, dict) or {"made_with", "rows", "bytes", "sha256"} - state.keys():
        raise InputError(f"{file} does not say how far a run has come: pass --overwrite to begin again")
    return state


def _json(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"


def _line(cells: Iterable[object]) -> bytes:
    line = io.StringIO()
    # The writer quotes the characters of its line end, and a carriage return has to be quoted.
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue().removesuffix("\r\n").encode() + b"\n"


def _cell(value: object) -> object:
    if value is None or isinstance(value, str | float):
        return "" if value is None else value
    return json.dumps(value, ensure_ascii=False, default=str).strip('"')
