"""Tables of the results of `benchmarks/accuracy.sh`: mean and standard deviation over seeds, and a long-form CSV."""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"(?P<task>.+)-(?P<seed>\d+)-(?P<method>model|norm-tuning|ofa|ofa-algorithm1)\.(?P<kind>\w+)\.json")

_ROWS = {
    ("model", "plain"): "zero-shot",
    ("model", "context"): "in-context learning",
    ("norm-tuning", "plain"): "norm tuning",
    ("ofa", "plain"): "OFA",
    ("ofa-algorithm1", "plain"): "OFA, sign of Algorithm 1",
    ("norm-tuning", "context"): "norm tuning + demonstrations",
    ("ofa", "context"): "OFA + demonstrations",
    ("ofa-algorithm1", "context"): "OFA, sign of Algorithm 1, + demonstrations",
}


@dataclass(frozen=True)
class Value:
    """One number with its task, seed, row and metric."""

    task: str
    seed: int
    row: str
    metric: str
    value: float


def read(folder: Path) -> list[Value]:
    """Every accuracy, macro-F1, calibration error and drift of the scales in the folder."""
    values = []
    for path in sorted(folder.glob("*.json")):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        document = json.loads(path.read_text(encoding="utf-8"))
        if match["kind"] == "fit":
            found = {"drift": document["drift"]}
            row = _ROWS[match["method"], "plain"]
        else:
            found = {name: document[name] for name in ("accuracy", "macro_f1", "expected_calibration_error")}
            row = _ROWS[match["method"], match["kind"]]
        values += [Value(match["task"], int(match["seed"]), row, name, float(value)) for name, value in found.items()]
    return values


def table(values: Iterable[Value], metric: str) -> str:
    """Markdown: a row per method, a column per task, mean ± standard deviation over the seeds."""
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for value in values:
        if value.metric == metric:
            cells[value.row, value.task].append(value.value)
    tasks = sorted({task for _, task in cells})
    lines = [f"| {metric.replace('_', ' ')} | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for row in _ROWS.values():
        if any((row, task) in cells for task in tasks):
            lines.append(f"| {row} | {' | '.join(_cell(cells.get((row, task), [])) for task in tasks)} |")
    return "\n".join(lines)


def _cell(numbers: list[float]) -> str:
    if not numbers:
        return "–"
    spread = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.3f}{spread} ({len(numbers)})"


def main() -> None:
    """Print the tables; write the CSV to `--csv`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    values = read(arguments.folder)
    if not values:
        sys.exit(f"{arguments.folder} holds no results of benchmarks/accuracy.sh; run that first")
    for metric in ("accuracy", "macro_f1", "expected_calibration_error", "drift"):
        print(table(values, metric), end="\n\n")
    if arguments.csv:
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("task", "seed", "method", "metric", "value"))
            writer.writerows((value.task, value.seed, value.row, value.metric, value.value) for value in values)


if __name__ == "__main__":
    main()
