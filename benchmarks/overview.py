"""The figure of README.md and docs/results.md: every method, and what relative steps gain, from committed records.

python -m benchmarks.overview               writes docs/figures/result.png
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ofa.comparison.outcomes import Draw, Outcome, Row, by_row, metric
from ofa.comparison.store import read_records
from ofa.report.statistics import FEWEST_PAIRS, Difference, Spread, macro_average, paired_difference

COMPARISON = Path("benchmarks/results/comparison_cpu")
STUDIED = {"chosen on": Path("studies/records/steps"), "confirmed on": Path("studies/records/confirmation")}
FIGURE = Path("docs/figures/result.png")
BASELINE = "norm-tuning"
Rows = Mapping[Row, Mapping[Draw, Outcome]]


def main() -> None:
    """Draw it."""
    studied = {name: without_demonstrations(folder) for name, folder in STUDIED.items()}
    figure(without_demonstrations(COMPARISON), studied, FIGURE)


def without_demonstrations(folder: Path) -> dict[Row, Mapping[Draw, Outcome]]:
    """The rows of a comparison without demonstrations, except in-context learning, which always has its shots."""
    rows = by_row(read_records(folder))
    bare = {row.name for row in rows if row.context == "prompt"}
    return {row: outcomes for row, outcomes in rows.items() if row.context == "prompt" or row.name not in bare}


def figure(comparison: Rows, studied: Mapping[str, Rows], path: Path) -> None:
    """Accuracy of every method on the left; on the right what else was studied against the first row of its study."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=(1, 1.1))
    accuracies = sorted(averages(comparison).items(), key=lambda item: item[1].mean)
    for place, (row, spread) in enumerate(accuracies):
        color = "tab:orange" if row.method.startswith("ofa") else "black" if row.method == BASELINE else "tab:blue"
        left.errorbar(100 * spread.mean, place, xerr=100 * (spread.deviation or 0), fmt="o", color=color, linewidth=1)
    left.set_yticks(range(len(accuracies)), [row.method for row, _ in accuracies], fontsize=8)
    left.set_title("accuracy in %, five shots per class (± over seeds)", fontsize=9)
    compared = [(name, *item) for name, rows in studied.items() for item in gains(rows).items()]
    for place, (_, _, difference) in enumerate(compared):
        _draw(right, place, difference)
    labels = [
        f"{row.name.replace('learning_rate=', 'rate ')}\n{name} {gain.pairs} draws" for name, row, gain in compared
    ]
    right.set_yticks(range(len(compared)), labels, fontsize=8)
    right.axvline(0, color="gray", linewidth=0.8)
    right.set_title("points over norm tuning with one step size (95 %)", fontsize=9)
    right.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110)


def averages(rows: Rows) -> dict[Row, Spread]:
    """Macro average over the tasks of every row that finished all of them with some seed."""
    problems = sorted({draw.problem for outcomes in rows.values() for draw in outcomes})
    found = {row: macro_average(metric(outcomes), problems) for row, outcomes in rows.items()}
    return {row: spread for row, spread in found.items() if spread}


def gains(rows: Rows) -> dict[Row, Difference]:
    """Every row with enough pairs against norm tuning with one step size for all scales, on the same shots."""
    base = next(row for row in rows if row.method == BASELINE and ("relative", "False") in row.settings)
    found = {row: paired_difference(metric(rows[row]), metric(rows[base])) for row in rows if row != base}
    return {row: difference for row, difference in found.items() if difference and difference.pairs >= FEWEST_PAIRS}


def _draw(axis: Any, place: int, difference: Difference) -> None:
    """A point and its interval."""
    axis.plot(100 * difference.mean, place, "o", color="tab:orange")
    if difference.interval:
        axis.plot([100 * difference.interval.low, 100 * difference.interval.high], [place, place], color="tab:orange")


if __name__ == "__main__":
    main()
