"""Write rows with their predictions: names of the columns, and a file that a stopped run can continue."""

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
from typing import IO

from filelock import FileLock, Timeout

from ofa.errors import InputError
from ofa.files import Json, reason, write_json, write_text
from ofa.tasks.tables import Row, parse_json, read_text
from ofa.tasks.task import Task

SUFFIXES = (".csv", ".jsonl")


@dataclass(frozen=True)
class Survey:
    """The number of rows to predict, of rows without text, and all columns in order."""

    rows: int
    blank: int
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Naming:
    """Names of the predictions' columns; a name that the input uses gets the prefix predicted_."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    abstain_below: float = 0.0
    """Below this probability of the most probable label a row has none."""

    def answer(self, row: Row, prediction: str | None, probabilities: Sequence[float] | None) -> Row:
        """A row of input with its prediction: label and probabilities, or the completion of an open-ended task."""
        if not self.labels:
            return {**row, self.completion: prediction}
        by_label = None if probabilities is None else dict(zip(self.labels, probabilities, strict=True))
        if probabilities and max(probabilities) < self.abstain_below:
            prediction = None
        return {**row, self.label: prediction, self.probabilities: by_label}

    def withheld(self, answers: Iterable[Row]) -> int:
        """The number of answers whose label was left out as too improbable."""
        return sum(answer[self.label] is None and answer[self.probabilities] is not None for answer in answers)

    @cached_property
    def label(self) -> str:
        """The column of the predicted label."""
        return free_name("label", self.columns)

    @cached_property
    def completion(self) -> str:
        """The column of an open-ended task's answers."""
        return free_name("completion", self.columns)

    @cached_property
    def probabilities(self) -> str:
        """The name of the probabilities in JSON."""
        return free_name("probabilities", self.columns)

    @cached_property
    def flat(self) -> tuple[str, ...]:
        """The columns of a CSV file: the input's, the label, and a probability for each label."""
        if not self.labels:
            return (*self.columns, self.completion)
        probabilities = (free_name(f"probability_{label}", self.columns) for label in self.labels)
        return (*self.columns, self.label, *probabilities)

    def flattened(self, answer: Row) -> list[object]:
        """An answer as a row of the CSV file."""
        if not self.labels:
            return [_cell(answer.get(name)) for name in self.flat]
        by_label = answer[self.probabilities]
        numbers = by_label.values() if isinstance(by_label, Mapping) else [""] * len(self.labels)
        return [*(_cell(answer.get(name)) for name in (*self.columns, self.label)), *numbers]


def free_name(name: str, taken: Iterable[str], prefix: str = "predicted_") -> str:
    """The name, after as many prefixes as make it new, whatever its case."""
    used = {column.casefold() for column in taken}
    while name.casefold() in used:
        name = prefix + name
    return name


def check_out(path: Path, *, overwrite: bool) -> None:
    """Raise `InputError` for an unknown suffix, a file that exists unless `overwrite`, or a folder that is no place."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path} has no suffix for predictions: end it in {' or '.join(SUFFIXES)}")
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise InputError(f"{path} cannot be written: give the name of a file in an existing folder that can be written")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already: choose another --out, or pass --overwrite")


def survey(rows: Iterable[tuple[str, Row]], task: Task) -> Survey:
    """Read all rows once, so that a bad row is refused before a long run.

    Raises:
        InputError: a row cannot be read, or lacks a column of the task.
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
    """A file of predictions, written in chunks to a hidden partial file, and renamed when it is complete.

    `rows` is the number of finished rows, `withheld` of those without a label among them. A second hidden file records
    how much of the partial file is valid, a digest of its input rows, and the settings in `made_with`.
    """

    def __init__(self, path: Path, naming: Naming, made_with: Mapping[str, object]) -> None:
        self.path = path
        self.naming = naming
        self.made_with = json.loads(json.dumps(made_with))
        self.rows = self.withheld = 0
        self._partial = path.with_name(f".{path.name}.partial")
        self._state = path.with_name(f".{path.name}.partial.json")
        self._digest = hashlib.sha256()
        self._file: IO[bytes]

    @contextmanager
    def opened(self, *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Open the partial file for `append`; it is renamed if the body succeeds.

        Raises:
            InputError: the file or a partial one exists and neither `resume` nor `overwrite` is given; it was started
                with other settings; another process is writing it; or it cannot be written.
        """
        with _writing(self.path), _sole(self.path):
            state = self._continued(resume, overwrite)
            self.rows, self.withheld, self._expected = (state[name] for name in ("rows", "withheld", "sha256"))
            with self._partial.open("ab") as self._file:
                self._file.truncate(state["bytes"])
                if not state["bytes"] and self.path.suffix.lower() == ".csv":
                    self._write([_line(self.naming.flat)])
                yield
            os.replace(self._partial, self.path)
            self._state.unlink()

    def remaining(self, rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        """The rows that are not finished.

        Raises:
            InputError: the finished rows are not the first of these.
        """
        left = iter(rows)
        for _, row in islice(left, self.rows):
            self._digest.update(_json(row))
        if self._digest.hexdigest() != self._expected:
            raise InputError(
                f"the data differs from that of the stopped run of {self.path}: give the same file, or --overwrite to "
                "start again"
            )
        return left

    def append(self, rows: Sequence[Row], answers: Sequence[Row]) -> None:
        """Write the answers to the next rows, and sync them to disk."""
        flat = self.path.suffix.lower() == ".csv"
        self._write(_line(self.naming.flattened(answer)) if flat else _json(answer) for answer in answers)
        for row in rows:
            self._digest.update(_json(row))
        self.rows += len(rows)
        if self.naming.labels:
            self.withheld += self.naming.withheld(answers)
        state = {"rows": self.rows, "withheld": self.withheld, "bytes": self._file.tell()}
        write_json(self._state, {"made_with": self.made_with, **state, "sha256": self._digest.hexdigest()})

    def _continued(self, resume: bool, overwrite: bool) -> Json:
        """The state of an earlier run, or the initial state."""
        start = {"rows": 0, "withheld": 0, "bytes": 0, "sha256": hashlib.sha256().hexdigest()}
        check_out(self.path, overwrite=overwrite)  # again: another run may have finished since the command checked
        if overwrite or not self._state.exists():
            return start
        if not resume:
            raise InputError(f"{self.path} belongs to a run that was stopped: pass --resume, or --overwrite")
        state = _read_state(self._state)
        if state["made_with"] != self.made_with:
            other = next(name for name in self.made_with if state["made_with"].get(name) != self.made_with[name])
            raise InputError(
                f"{self.path} was started with another {other}: resume with the same, or start again with --overwrite"
            )
        if not self._partial.exists() or self._partial.stat().st_size < state["bytes"]:
            raise InputError(f"{self._partial} is missing or truncated: pass --overwrite to start again")
        return state

    def _write(self, lines: Iterable[bytes]) -> None:
        self._file.writelines(lines)
        self._file.flush()
        os.fsync(self._file.fileno())


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of the same columns at once, as CSV or JSON lines by the suffix.

    Raises:
        InputError: the file cannot be written.
    """
    if path.suffix.lower() == ".csv":
        lines = [_line(rows[0]), *(_line(map(_cell, row.values())) for row in rows)]
    else:
        lines = [_json(row) for row in rows]
    write_text(path, b"".join(lines).decode())


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
    """Lock the file for this process."""
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        with lock:
            try:
                yield
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout as error:
        raise InputError(f"another process is writing {path}: choose another --out") from error


def _read_state(file: Path) -> Json:
    state = parse_json(read_text(file), file)
    if not isinstance(state, dict) or {"made_with", "rows", "withheld", "bytes", "sha256"} - state.keys():
        raise InputError(f"{file} is damaged, so the run cannot be resumed: pass --overwrite to start again")
    return state


def _json(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"


def _line(cells: Iterable[object]) -> bytes:
    line = io.StringIO()
    # With this line end the writer quotes carriage returns, which CSV readers need.
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue().removesuffix("\r\n").encode() + b"\n"


def _cell(value: object) -> object:
    if value is None or isinstance(value, str | float):
        return "" if value is None else value
    return json.dumps(value, ensure_ascii=False, default=str).strip('"')
