"""The picture of `benchmarks.estimators`: cost of a training step against error of the traces."""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from math import sqrt
from pathlib import Path

STYLES = {
    "hutchinson": ("o", "#c44e52", "finite differences, gradient in P"),
    "exact": ("*", "#2a7f3f", "exact (closed form)"),
}


def plot(table: Path, picture: Path) -> None:
    """Draw cost against error from a table of `benchmarks.estimators`."""
    import matplotlib.pyplot as plt

    errors, costs = _read(table)
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for name, (marker, colour, label) in STYLES.items():
        points = sorted((costs[key], errors[key], key[1]) for key in costs if key[0] == name)
        if not points:
            continue
        x, y, _ = zip(*points, strict=True)
        size = 16 if name == "exact" else 7
        axes.plot(x, y, marker=marker, color=colour, label=label, markersize=size, linewidth=1)
        for at, error, samples in points:
            note = f"{at:.2f}× the cost" if name == "exact" else f"N = {samples}"
            axes.annotate(note, (at, error), xytext=(8, 6), textcoords="offset points", fontsize=8, color=colour)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs of a training step, plain norm tuning = 1")
    axes.set_ylabel("relative error of one pass's traces")
    axes.set_xticks([1, 2, 3, 5, 8], ["1", "2", "3", "5", "8"])
    axes.set_xlim(0.95, 10)
    axes.set_ylim(1e-7, 1)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8, markerscale=0.6)
    axes.set_title("Down and to the left is better", fontsize=10)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def _read(table: Path) -> tuple[dict[tuple[str, int], float], dict[tuple[str, int], float]]:
    """Root mean square of the errors over all groups, and cost, by estimator and samples."""
    squares: dict[tuple[str, int], list[float]] = defaultdict(list)
    costs: dict[tuple[str, int], float] = {}
    with table.open(newline="") as stream:
        for row in csv.DictReader(stream):
            key = row["estimator"], int(row["samples"])
            if row["epsilon"] != "auto":
                continue
            if row["metric"] == "error" and row["branch"] != "gradient":
                squares[key].append(float(row["value"]) ** 2)
            elif row["metric"] == "flops_ratio":
                costs[key] = float(row["value"])
    return {key: sqrt(sum(values) / len(values)) for key, values in squares.items()}, costs


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
