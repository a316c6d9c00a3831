"""Specify a comparison: a model, tasks, methods with their settings, seeds; expanded to rows and seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ofa.errors import InputError, first_sentence
from ofa.methods import METHODS
from ofa.tasks import did_you_mean

Options = TypeVar("Options", bound=BaseModel)

ALL = "all"
MOST_SEEDS = 1000
"""More is probably a typo, and would take weeks."""

_SEEDS = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")


class Row(BaseModel):
    """A method with the settings that differ from its defaults: one row of the tables."""

    model_config = ConfigDict(frozen=True)

    method: str
    settings: dict[str, Any] = {}


class Grid(BaseModel):
    """The whole comparison: the product of tasks, rows and seeds.

    On the command line or in YAML, `tasks` and `methods` are a list or one text with commas, and `seeds` may have
    ranges ("42-46"). `methods` may also map a method to its settings, or to a list of such settings; a list as the
    value of a setting means one row for each of its values, several lists one row for each combination. "all" stands
    for every method with its defaults.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    tasks: tuple[str, ...]
    methods: tuple[Row, ...]
    seeds: tuple[int, ...]
    shots: int = Field(5, ge=1)
    test_size: int = Field(500, ge=1)
    contexts: tuple[Literal["prompt", "demonstrations"], ...] = ("prompt", "demonstrations")
    """The contexts to test in; a method that supports none of these is tested in its own."""
    chat: bool | None = None
    system: str | None = None
    """Whether every prompt is the user's turn of the model's chat template, and the system prompt."""
    text_column: str | None = None
    label_column: str | None = None
    separator: str | None = None
    """Columns and their separator, for tasks from the user's files."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks(cls, value: object) -> object:
        return value if value is None else _filled("tasks", _unique(str(name) for name in _items(value)))

    @field_validator("methods", mode="before")
    @classmethod
    def _methods(cls, value: object) -> object:
        value = _parsed(value)
        rows = _unique(
            Row(method=name, settings=settings)
            for entry in ([value] if isinstance(value, Mapping) else _items(value))
            for method, given in (entry.items() if isinstance(entry, Mapping) else [(str(entry), None)])
            for name in _names(method)
            for settings in _combinations(method, given)
        )
        return _filled("methods", rows)

    @field_validator("contexts", mode="before")
    @classmethod
    def _contexts(cls, value: object) -> object:
        return _filled("contexts", _unique(_items(value)))

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: object) -> object:
        return _filled("seeds", _unique(seed for part in _items(value) for seed in _seed_range(part)))

    def as_json(self) -> dict[str, object]:
        """The grid as JSON values, with ranges and combinations expanded."""
        return {**self.model_dump(mode="json"), "methods": [{row.method: row.settings} for row in self.methods]}


def checked_part(kind: type[Options], values: Mapping[str, object]) -> Options:
    """Validate the values that are options of this kind, from the command line, YAML or a caller.

    Raises:
        InputError: an option is missing or cannot be used; the message names it as on the command line.
    """
    values = {name: value for name, value in values.items() if name in kind.model_fields}
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        own = first.get("ctx", {}).get("error")
        if isinstance(own, InputError):
            raise own from error
        option = f"--{str(first['loc'][0]).replace('_', '-')}"
        if first["type"] == "missing" or first["input"] is None:
            raise InputError(f"{option} is missing: give it here or in --config") from error
        message = first["msg"][0].lower() + first["msg"][1:]
        raise InputError(f"{option} {first['input']} cannot be used: {message}") from error


def _parsed(value: object) -> object:
    """Methods with their settings, as the reader of --config hands them on in JSON; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise InputError(f"--methods {value} is no JSON ({first_sentence(error)}): write names with commas") from error


def _items(value: object) -> list[object]:
    """A list unchanged, a text split at commas, or a single value as a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _unique(items: Iterable[object]) -> list[object]:
    kept: list[object] = []
    for item in items:
        if item not in kept:
            kept.append(item)
    return kept


def _filled(name: str, items: list[object]) -> list[object]:
    if not items:
        raise InputError(f"the grid has no --{name}: give at least one")
    return items


def _names(method: object) -> tuple[str, ...]:
    if method == ALL:
        return tuple(METHODS)
    if method not in METHODS:
        hint = did_you_mean(str(method), (*METHODS, ALL)) or f": use one of {', '.join(METHODS)}"
        raise InputError(f'there is no method "{method}"{hint}')
    return (str(method),)


def _combinations(method: object, given: object) -> list[dict[str, object]]:
    """One mapping of settings for each combination of the listed values."""
    if given is None:
        return [{}]
    if isinstance(given, list):
        return [settings for one in given for settings in _combinations(method, one)]
    if not isinstance(given, Mapping):
        raise InputError(f"among the settings of {method} is {given!r}: write `name: value` or `name: [value, …]`")
    values = [value if isinstance(value, list) else [value] for value in given.values()]
    empty = next((name for name, listed in zip(given, values, strict=True) if not listed), None)
    if empty is not None:
        raise InputError(f"the setting {empty} of {method} is an empty list: give it a value or leave it out")
    return [dict(zip(map(str, given), map(_number, chosen), strict=True)) for chosen in product(*values)]


def _number(value: object) -> object:
    """Parse numbers that YAML reads as text, such as 1e-3."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _seed_range(part: object) -> range:
    match = _SEEDS.fullmatch(str(part))
    if match is None:
        raise InputError(f'the seeds "{part}" cannot be read: write a range such as 42-46, or a list such as 42,43')
    first, last = int(match[1]), int(match[2] or match[1])
    if not 0 <= last - first < MOST_SEEDS:
        raise InputError(f'the seeds "{part}" are none, or more than {MOST_SEEDS}: write a range such as 42-46')
    return range(first, last + 1)
