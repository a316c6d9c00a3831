"""Define a cell of a comparison, and its record in the results file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ofa.errors import InputError
from ofa.files import Json

PROTOCOL = 2
"""Version of the measurements: incremented whenever the same cell would give another result.

Since 2, runs on one or two shots per class are shorter by default.
"""

READABLE = (1, PROTOCOL)
"""Versions whose lines can be read; a folder holds one of them, and a run adds only to the newest."""

CONTEXTS = ("prompt", "demonstrations")
"""In front of a tested text: nothing, or the cell's shots."""


@dataclass(frozen=True)
class Cell:
    """One method on one task with one draw of shots; `settings` are the options that differ from the method's defaults.

    `task_sha256` is the hash of the task with its training and test examples, to distinguish files of the same name.
    """

    model: str
    task: str
    task_sha256: str
    method: str
    seed: int
    shots: int
    test_size: int
    settings: Json = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Unique key of the cell: 16 hexadecimal digits of its hash."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def row(self) -> str:
        """The method with its settings, as in a table: `ofa (sharpness=0.01)`."""
        told = ", ".join(f"{name}={value}" for name, value in sorted(self.settings.items()))
        return f"{self.method} ({told})" if told else self.method


@dataclass(frozen=True)
class Score:
    """The test of one cell in one context.

    `metrics` is `Metrics.to_dict()`, `predictions` and `truth` are label indices by example, `seconds_per_text` the
    latency of a prediction, `extra_tokens` the tokens in front of every prompt.
    """

    metrics: Json
    predictions: tuple[int, ...]
    truth: tuple[int, ...]
    seconds_per_text: float
    extra_tokens: int

    @property
    def accuracy(self) -> float:
        """Share of correct predictions."""
        return float(self.metrics["accuracy"])


@dataclass(frozen=True)
class Record:
    """One line of the results file. `scores` is by context; it is empty if the cell failed with `error`.

    `seconds` is the time of the whole cell, `fit_seconds` of the adaptation; `stored_bytes` is the size of an adapter,
    `peak_memory_bytes` the worker's peak memory so far (the device's on a GPU). `versions` includes the device's name;
    `notes` are the method's own.
    """

    cell: Cell
    error: str | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    fit_seconds: float = 0.0
    seconds: float = 0.0
    trainable_parameters: int = 0
    stored_bytes: int = 0
    peak_memory_bytes: int = 0
    shots_sha256: str = ""
    finished: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Json = field(default_factory=dict)
    protocol: int = PROTOCOL

    @property
    def done(self) -> bool:
        """True if the cell did not fail."""
        return self.error is None

    def to_line(self) -> str:
        """The record as one line of JSON, with the cell's key, without the line end."""
        return json.dumps({"key": self.cell.key, **asdict(self)}, sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_line(cls, line: str, where: str) -> Record:
        """Parse a line of `to_line`; `where` names file and line in errors.

        Raises:
            InputError: the line is of an unknown version of the protocol, or damaged.
        """
        try:
            values = json.loads(line)
            protocol = values["protocol"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{where} is no record of a comparison ({error}): remove the line") from error
        if protocol not in READABLE:
            raise other_protocol(where, protocol, PROTOCOL)
        try:
            values.pop("key")
            cell = Cell(**values.pop("cell"))
            scores = {name: _score(score) for name, score in values.pop("scores").items()}
            return cls(cell=cell, scores=scores, **values)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{where} is no record of a comparison ({error}): remove the line") from error


def other_protocol(where: str, found: object, wanted: int) -> InputError:
    """The refusal of a line of another version of the protocol."""
    return InputError(
        f"{where} has version {found} of the protocol, which must not be mixed with version {wanted}: choose another "
        "output folder"
    )


def _score(values: Json) -> Score:
    lists = {name: tuple(values[name]) for name in ("predictions", "truth")}
    return Score(**{**values, **lists})
