"""Read the notes of the runs of a comparison's folder: command lines and requested cells."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ofa.comparison.store import RUN


@dataclass(frozen=True)
class Runs:
    """The distinct commands of a folder, oldest first, and the keys of the cells they requested."""

    commands: tuple[str, ...] = ()
    cells: frozenset[str] = frozenset()


NO_RUNS = Runs()


def read_runs(folder: Path) -> Runs:
    """The notes of `ofa compare` in a folder; empty if missing or damaged, since a report needs only records."""
    try:
        newest = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return NO_RUNS
    noted = list(_noted(newest))
    commands = dict.fromkeys(_command(run) for run in reversed(noted) if run.get("command"))
    listed = [run["cells"] for run in noted if isinstance(run.get("cells"), list)]
    cells = frozenset(str(key) for keys in listed for key in keys)
    return Runs(tuple(commands), cells)


def _noted(newest: object) -> Iterator[Mapping[str, Any]]:
    """The runs, newest first."""
    if isinstance(newest, Mapping):
        yield newest
        yield from (run for run in newest.get("earlier", ()) if isinstance(run, Mapping))


def _command(run: Mapping[str, object]) -> str:
    command = run["command"]
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command)
