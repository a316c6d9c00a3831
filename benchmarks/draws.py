"""Measurements of single draws of shots, one JSON line each, so that a stopped run continues; their table in a page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

L = TypeVar("L")
"""A dataclass with fields `task`, the name without its folder, and `seed`."""


def read(file: Path, line: type[L]) -> list[L]:
    """The finished draws of a file; none if it does not exist."""
    if not file.exists():
        return []
    return [line(**json.loads(text)) for text in file.read_text(encoding="utf-8").splitlines()]


def completed(
    file: Path, line: type[L], tasks: Iterable[str], seeds: Iterable[int], measured: Callable[[str, int], Any]
) -> list[L]:
    """All draws of the file, after those that it lacked were measured and added one by one."""
    done = {(known.task, known.seed) for known in read(file, line)}  # type: ignore[attr-defined]
    for task, seed in [(task, seed) for seed in seeds for task in tasks]:
        if (Path(task).name, seed) not in done:
            found = json.dumps(asdict(measured(task, seed)))
            with file.open("a", encoding="utf-8") as stream:
                stream.write(found + "\n")
    return read(file, line)


def fill(page: Path, name: str, table: str) -> None:
    """Write a table between `<!-- name -->` and `<!-- end -->`."""
    place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    text = place.sub(lambda found: found[1] + table + found[2], page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")
