"""The figure of README.md and docs/results.md: what every method gains over norm tuning, from committed records.

python -m benchmarks.overview               writes docs/figures/result.png
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ofa.comparison.outcomes import Draw, Outcome, Row, by_row, metric
from ofa.comparison.store import read_records
from ofa.report.statistics import FEWEST_PAIRS, Difference, paired_difference

STUDIES = (Path("studies/records/confirmation"), Path("studies/records/baselines"))
FIGURE = Path("docs/figures/result.png")
BASELINE = "norm-tuning (relative=False)"
SHOWN = {
    "norm-tuning (learning_rate=0.01)": "ofa fit: relative steps of 1e-2",
    "norm-tuning (learning_rate=0.005)": "relative steps of 5e-3",
    "ofa (learning_rate=0.005, sharpness=0.1)": "relative steps of 5e-3, sharpness 0.1",
    "lora": "LoRA",
    "linear-probe": "linear probe",
    "centroids": "class centroids",
    "icl-calibrated": "calibrated in-context learning",
    "encoder": "sentence encoder and regression",
    "zero-shot": "zero-shot",
    "icl": "in-context learning",
}
"""The rows of the figure, and what they are called there."""

Rows = Mapping[Row, Mapping[Draw, Outcome]]


def main() -> None:
    """Draw it."""
    figure({name: gain for folder in STUDIES for name, gain in gains(by_row(read_records(folder))).items()}, FIGURE)


def gains(rows: Rows) -> dict[str, Difference]:
    """Every shown row against norm tuning with one step size for all scales, on the same shots."""
    names = {row: row.name.replace("max_steps=60, ", "") for row in rows}
    base = metric(next(rows[row] for row in rows if names[row] == BASELINE))
    found = {SHOWN[names[row]]: paired_difference(metric(rows[row]), base) for row in rows if names[row] in SHOWN}
    return {name: difference for name, difference in found.items() if difference}


def figure(gained: Mapping[str, Difference], path: Path) -> None:
    """A point for every method with its interval, hollow and alone where there are too few draws for one."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 0.8 + 0.32 * len(gained)), layout="constrained")
    axis = drawn.subplots()
    ordered = sorted(gained.items(), key=lambda item: item[1].mean)
    for place, (name, gain) in enumerate(ordered):
        color = "tab:orange" if name.startswith("ofa") else "tab:blue"
        enough = gain.pairs >= FEWEST_PAIRS and gain.interval
        axis.plot(100 * gain.mean, place, "o", color=color, markerfacecolor=color if enough else "white")
        if enough and gain.interval:
            axis.plot([100 * gain.interval.low, 100 * gain.interval.high], [place, place], color=color)
    axis.set_yticks(range(len(ordered)), [f"{name}, {gain.pairs} draws" for name, gain in ordered], fontsize=9)
    axis.axvline(0, color="gray", linewidth=0.8)
    axis.set_title("points of accuracy over norm tuning with one step size, on the same shots (95 %)", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
