"""Whether a flatter end goes with a smaller generalization gap, over the weights of the sharpness.

    python -m benchmarks.screen studies/flatness.yaml studies/records/flatness
    python -m benchmarks.flatness studies/records/flatness

Within every draw of shots the runs are ranked by the sharpness H on the shots at the end of training, and by the gap:
negative log-likelihood on the test texts minus that on the shots. Printed is Spearman's rank correlation, its mean over
the draws with the 95 % bootstrap interval over runs; for the true gradient of the sharpness, and for the control whose
channels are permuted. Runs without a weight belong to both.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ofa.comparison.outcomes import Draw, draw_of
from ofa.comparison.records import Record
from ofa.comparison.store import read_records
from ofa.report.statistics import Interval, descending_ranks

KINDS = ("true", "permuted")
RESAMPLES = 2000


@dataclass(frozen=True)
class Run:
    """The sharpness at the end of a run, and its generalization gap."""

    sharpness: float
    gap: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="folder that benchmarks.screen filled")
    records = read_records(parser.parse_args(arguments).records)
    print("| gradient | draws | runs | rank correlation of H and gap |", "|---|---|---|---|", sep="\n")
    for kind in KINDS:
        draws = runs(records, kind)
        mean, interval = correlation(list(draws.values()))
        within = f"{mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]".replace("-", "−")
        print(f"| {kind} | {len(draws)} | {sum(map(len, draws.values()))} | {within} |")


def runs(records: Iterable[Record], kind: str) -> dict[Draw, list[Run]]:
    """The runs of a kind by draw; draws with fewer than three are left out."""
    found: dict[Draw, list[Run]] = defaultdict(list)
    for record in records:
        end = record.notes.get("at_the_end")
        control = record.cell.settings.get("control", "true")
        if record.done and end and (control == kind or not record.cell.settings.get("sharpness")):
            tested = float(record.scores["prompt"].metrics["negative_log_likelihood"])
            gap = tested - float(end["shots"]["negative_log_likelihood"])
            found[draw_of(record)].append(Run(float(end["sharpness"]), gap))
    return {draw: kept for draw, kept in found.items() if len(kept) >= 3}


def correlation(draws: Sequence[Sequence[Run]]) -> tuple[float, Interval]:
    """Spearman's rank correlation within the draws, its mean over them, and the interval over resampled runs."""
    random = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES):
        drawn = [[draw[i] for i in random.integers(len(draw), size=len(draw))] for draw in draws]
        # One run drawn many times has no ranks.
        known = [value for value in map(_spearman, drawn) if not np.isnan(value)]
        means += [np.mean(known)] if known else []
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean([_spearman(draw) for draw in draws])), Interval(float(low), float(high))


def _spearman(runs: Sequence[Run]) -> float:
    ranks = [descending_ranks(values) for values in zip(*((run.sharpness, run.gap) for run in runs), strict=True)]
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(ranks)[0, 1])


if __name__ == "__main__":
    main()
