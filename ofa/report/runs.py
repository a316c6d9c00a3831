"""Read the notes of the runs of a comparison's folder: command lines and requested cells."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

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
        noted = [newest, *newest["earlier"]]
        commands = dict.fromkeys(run["command"] for run in reversed(noted))
        return Runs(tuple(commands), frozenset(key for run in noted for key in run["cells"]))
    except (OSError, ValueError, KeyError, TypeError):
        return NO_RUNS
