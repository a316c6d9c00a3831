"""Seconds of the cells of a comparison: median, minimum and maximum over seeds, by method and task.

    python -m benchmarks.comparison_seconds RESULTS --out benchmarks/results/comparison_seconds_gpu.csv

RESULTS is the folder that `ofa compare --out` wrote, finished or not. `cell` is a whole cell (fit, tests, checks),
`fit` only its adaptation; failed cells do not count. Other devices, libraries, numbers of threads or of workers on a
GPU have separate rows. Results do not contain their commit: it is the one checked out, or `--commit`.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.table import commit, significant, writing
from ofa.comparison.records import Record
from ofa.comparison.store import read_records
from ofa.errors import InputError

STATISTICS = {"median": median, "min": min, "max": max}
_MADE_BY = ("device", "threads", "workers_per_gpu", "dtype", "torch", "transformers")


@dataclass(frozen=True)
class Row:
    """One number; `metric` is what was timed and the statistic over `seeds` cells."""

    benchmark: str
    task: str
    method: str
    metric: str
    value: float
    unit: str
    seeds: int
    device: str
    threads: str
    workers_per_gpu: str
    dtype: str
    torch: str
    transformers: str
    commit: str


def rows(records: Sequence[Record], of_commit: str) -> Iterator[Row]:
    """The rows of all groups of finished cells, in the order in which the first of each was finished."""
    groups: dict[tuple[str, str, tuple[str, ...]], list[Record]] = defaultdict(list)
    for record in records:
        if record.done:
            groups[record.cell.task, record.cell.row, _made_by(record)].append(record)
    for (task, method, made_by), cells in groups.items():
        times = {"cell": [one.seconds for one in cells], "fit": [one.fit_seconds for one in cells]}
        for name, seconds in times.items():
            for statistic, of in STATISTICS.items():
                value = significant(of(seconds))
                told = (f"{name}_{statistic}", value, "s", len(cells))
                yield Row("comparison", task, method, *told, *made_by, of_commit)


def _made_by(record: Record) -> tuple[str, ...]:
    """The versions that made a record; a worker alone on its GPU does not record the number of workers."""
    found = {"workers_per_gpu": "1", **record.versions}
    return tuple(found.get(name, "unknown") for name in _MADE_BY)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="commit of the code that ran, where it is not the one checked out")
    given = parser.parse_args(arguments)
    try:
        records = read_records(given.results)
    except InputError as error:
        parser.error(str(error))
    found = rows(records, given.commit or commit())
    with writing(given.out, Row) as write:
        write(found)


if __name__ == "__main__":
    main()
