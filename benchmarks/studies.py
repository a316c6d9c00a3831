"""Tables and figures of docs/results.md and docs/studies.md, from the records of the studies.

A study is a grid, `studies/NAME.yaml`, and the folder `studies/records/NAME` that `ofa compare --config
studies/NAME.yaml --out studies/records/NAME` fills, or `python -m benchmarks.screen` if the grid says `screened: true`.
The first row of the grid is what the others are set against.

    python -m benchmarks.studies            writes what stands between `<!-- study NAME -->` and `<!-- end -->`
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import overview
from ofa.commands.options import read_mapping
from ofa.comparison import grid as grids
from ofa.comparison.grid import Grid
from ofa.comparison.outcomes import Draw, Outcome, Row, by_row, metric
from ofa.comparison.records import CONTEXTS
from ofa.comparison.store import RESULTS, read_records
from ofa.report.formatting import NOTHING, percent, points, points_interval, seconds
from ofa.report.statistics import FEWEST_PAIRS, Difference, Interval, paired_difference

STUDIES, RECORDS = Path("studies"), Path("studies/records")
PAGES = (Path("docs/results.md"), Path("docs/studies.md"))
FIGURES = Path("docs/figures")
UNSEEN = {"confirmation": frozenset({102, 103, 104})}
"""Seeds of a study of which no result was known when the default was chosen; they have a table of their own."""
RESAMPLES = 2000
_PLACE = re.compile(r"<!-- study (?P<name>[\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
_HEAD = (
    "| | accuracy | NLL | ECE | accuracy, points | NLL | better / worse | fit |",
    "|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Line:
    """A row of a study over the draws that it shares with the baseline; the baseline itself has no differences."""

    label: str
    accuracy: float
    likelihood: float
    calibration: float
    fit_seconds: float
    gained: Difference | None = None
    spared: Difference | None = None


def main() -> None:
    """Fill the pages and draw the figures, also the one of README.md."""
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    overview.main()


def filled(page: str) -> str:
    """The page with the tables of today's records."""
    return _PLACE.sub(lambda place: _section(place["name"]), page)


def study(rows: Mapping[Row, Mapping[Draw, Outcome]], base: Row) -> list[Line]:
    """The lines of one table: the baseline first, then the others that share draws with it by their gain."""
    others = [_line(row, rows[row], rows[base]) for row in rows if row != base and rows[row].keys() & rows[base].keys()]
    return [_line(base, rows[base], None), *sorted(others, key=lambda line: -line.gained.mean if line.gained else 0.0)]


def with_shots(rows: Mapping[Row, Mapping[Draw, Outcome]], shots: int) -> dict[Row, dict[Draw, Outcome]]:
    """The draws with so many shots per class; rows without one are left out."""
    kept = {row: {draw: one for draw, one in part.items() if draw.problem.shots == shots} for row, part in rows.items()}
    return {row: part for row, part in kept.items() if part}


def with_seeds(rows: Mapping[Row, Mapping[Draw, Outcome]], seeds: frozenset[int]) -> dict[Row, dict[Draw, Outcome]]:
    """The draws of these seeds; rows without one are left out."""
    kept = {row: {draw: one for draw, one in part.items() if draw.seed in seeds} for row, part in rows.items()}
    return {row: part for row, part in kept.items() if part}


def table(lines: Sequence[Line]) -> str:
    """The lines in Markdown."""
    return "\n".join((*_HEAD, *map(_row, lines)))


def by_task(rows: Mapping[Row, Mapping[Draw, Outcome]], base: Row) -> str:
    """Gains in points by task, mean ± standard error over the seeds, of the rows that share every task with `base`.

    The last column is the mean over all draws, with the 95 % interval if tasks are resampled, and seeds within them.
    """
    tasks = sorted({draw.problem.task for draw in rows[base]})
    lines = [f"| | {' | '.join(tasks)} | all, whole tasks resampled |", f"|{'---|' * (len(tasks) + 2)}"]
    for row in rows:
        gains = [_gains(rows[row], rows[base], task) for task in tasks]
        if row != base and all(len(part) > 1 for part in gains):
            told = [f"{points(part.mean())} ± {100 * part.std(ddof=1) / len(part) ** 0.5:.1f}" for part in gains]
            told.append(f"{points(np.concatenate(gains).mean())} {points_interval(_over_tasks(gains))}")
            lines.append(f"| {row.label} | {' | '.join(told)} |")
    return "\n".join(lines)


def _over_tasks(gains: Sequence[NDArray[np.float64]]) -> Interval:
    """The interval of the mean over tasks, which are resampled as a whole, and their seeds within them."""
    random = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES):
        tasks = [gains[place] for place in random.integers(len(gains), size=len(gains))]
        means.append(np.mean([random.choice(part, len(part)).mean() for part in tasks]))
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(low), float(high))


def _gains(outcomes: Mapping[Draw, Outcome], base: Mapping[Draw, Outcome], task: str) -> NDArray[np.float64]:
    ours, others = metric(outcomes), metric(base)
    return np.array([ours[draw] - others[draw] for draw in ours if draw in others and draw.problem.task == task])


def figure(lines: Sequence[Line], path: Path) -> None:
    """Differences to the baseline with their intervals: accuracy on the left, likelihood on the right."""
    from matplotlib.figure import Figure

    compared = [line for line in lines if line.gained and line.spared]
    drawn = Figure(figsize=(9, 0.8 + 0.32 * len(compared)), layout="constrained")
    left, right = drawn.subplots(1, 2, sharey=True)
    for axis, title, parts in (
        (left, "accuracy, points", [(line.gained, 100.0) for line in compared]),
        (right, "negative log-likelihood", [(line.spared, 1.0) for line in compared]),
    ):
        for place, (difference, unit) in enumerate(parts):
            if difference is not None:
                axis.plot(unit * difference.mean, place, "o", color="tab:blue")
                ends = difference.interval or Interval(difference.mean, difference.mean)
                axis.plot([unit * ends.low, unit * ends.high], [place, place], color="tab:blue")
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set_title(f"{title}, against {lines[0].label}", fontsize=9)
    left.set_yticks(range(len(compared)), [line.label for line in compared])
    left.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110)


def curves(tables: Mapping[int, Sequence[Line]], path: Path) -> None:
    """Accuracy of every row, and its difference to the baseline, against the number of shots per class."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = drawn.subplots(1, 2)
    shots = list(tables)
    for label in dict.fromkeys(line.label for lines in tables.values() for line in lines):
        found = {number: line for number, lines in tables.items() for line in lines if line.label == label}
        (drawn_line,) = left.plot(list(found), [100 * line.accuracy for line in found.values()], "o-", label=label)
        gains = {number: line.gained for number, line in found.items() if line.gained}
        right.plot(list(gains), [100 * gain.mean for gain in gains.values()], "o-", color=drawn_line.get_color())
        for number, gain in gains.items():
            if gain.interval:
                ends = [100 * gain.interval.low, 100 * gain.interval.high]
                right.plot([number, number], ends, color=drawn_line.get_color(), linewidth=0.8)
    right.axhline(0, color="gray", linewidth=0.8)
    for axis, title in ((left, "accuracy in %"), (right, f"points over {next(iter(tables.values()))[0].label}")):
        axis.set(xscale="log", xlabel="shots per class", xticks=shots, xticklabels=shots)
        axis.minorticks_off()
        axis.set_title(title, fontsize=9)
    left.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110)


def _section(name: str) -> str:
    written = read_mapping(STUDIES / f"{name}.yaml")
    grid = Grid(**{key: value for key, value in written.items() if key in _GRID})
    records = read_records(RECORDS / name) if (RECORDS / name / RESULTS).is_file() else []
    rows = by_row(records)
    first = grid.methods[0]
    parts = [f"<!-- study {name} -->"]
    told = [context for context in CONTEXTS if any(_is(row, first, context) for row in rows)]
    for context in told:
        # In-context learning has demonstrations always, and is set against what has none.
        alone = {row.name for row in rows} - {row.name for row in rows if row.context in told}
        chosen = {row: part for row, part in rows.items() if row.context == context or row.name in alone}
        base = next(row for row in chosen if _is(row, first, context))
        shots = sorted({draw.problem.shots for draw in chosen[base]})
        tables = {number: study(with_shots(chosen, number), base) for number in shots}
        path = FIGURES / f"study_{name}_{context}.png"
        if len(shots) > 1:
            curves(tables, path)
        else:
            figure(tables[shots[0]], path)
        words = "Nothing in front of a text" if context == "prompt" else "Demonstrations in front of every text"
        for number, lines in tables.items():
            draws = sum(draw.problem.shots == number for draw in chosen[base])
            each = f", {number} shot{'s' * (number > 1)} per class" if len(shots) > 1 else ""
            parts += ["", f"{words}{each}, {draws} draws:", "", table(lines)]
        if name in UNSEEN:
            fresh = with_seeds(chosen, UNSEEN[name])
            seeds = f"seeds {min(UNSEEN[name])} to {max(UNSEEN[name])}"
            parts += ["", f"Of these, {seeds}, {len(fresh[base])} draws:", "", table(study(fresh, base))]
            parts += ["", "Points by task, mean ± standard error over the seeds:", "", by_task(chosen, base)]
            parts += ["", f"The same of {seeds} alone:", "", by_task(fresh, base)]
        parts += ["", f"![Differences](figures/{path.name})"]
    command = f"ofa compare --config studies/{name}.yaml --out studies/records/{name}"
    if written.get("screened"):
        command = f"python -m benchmarks.screen studies/{name}.yaml studies/records/{name}"
    return "\n".join([*parts, "", "```bash", command, "```", "<!-- end -->"])


def _is(row: Row, wanted: grids.Row, context: str) -> bool:
    settings = frozenset((key, str(value)) for key, value in wanted.settings.items())
    return (row.method, row.settings, row.context) == (wanted.method, settings, context)


_GRID = frozenset(Grid.model_fields)


def _line(row: Row, outcomes: Mapping[Draw, Outcome], base: Mapping[Draw, Outcome] | None) -> Line:
    shared = outcomes if base is None else {draw: outcomes[draw] for draw in outcomes if draw in base}
    accuracy, likelihood = metric(shared), metric(shared, "negative_log_likelihood")
    return Line(
        label=row.label,
        accuracy=_mean(accuracy),
        likelihood=_mean(likelihood),
        calibration=_calibration(shared),
        fit_seconds=float(np.mean([outcome.record.fit_seconds for outcome in shared.values()])),
        gained=_difference(accuracy, metric(base)) if base else None,
        spared=_difference(likelihood, metric(base, "negative_log_likelihood")) if base else None,
    )


def _calibration(outcomes: Mapping[Draw, Outcome]) -> float:
    """The mean expected calibration error of the draws that have one: not all that were screened do."""
    name = "expected_calibration_error"
    return _mean(metric({draw: one for draw, one in outcomes.items() if name in one.score.metrics}, name))


def _difference(values: Mapping[Draw, float], base: Mapping[Draw, float]) -> Difference | None:
    found = paired_difference(values, base)
    return replace(found, interval=None) if found and found.pairs < FEWEST_PAIRS else found


def _mean(values: Mapping[Draw, float]) -> float:
    return float(np.mean(list(values.values()))) if values else float("nan")


def _row(line: Line) -> str:
    calibration = NOTHING if np.isnan(line.calibration) else f"{line.calibration:.3f}"
    told = [line.label, percent(line.accuracy), f"{line.likelihood:.3f}", calibration]
    if line.gained is None or line.spared is None:
        return f"| {' | '.join([*told, NOTHING, NOTHING, NOTHING, seconds(line.fit_seconds)])} |"
    spared = f"{line.spared.mean:+.3f}".replace("-", "−").replace("+0.000", "0.000")
    ends = line.spared.interval
    within = f" [{ends.low:+.3f}, {ends.high:+.3f}]".replace("-", "−") if ends else ""
    gained = f"{points(line.gained.mean)} {points_interval(line.gained.interval)}".strip()
    counts = f"{line.gained.wins} / {line.gained.losses} of {line.gained.pairs}"
    return f"| {' | '.join([*told, gained, spared + within, counts, seconds(line.fit_seconds)])} |"


if __name__ == "__main__":
    main()
