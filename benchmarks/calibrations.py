"""What each calibration of `ofa fit` does to the probabilities of the same trained model.

python -m benchmarks.calibrations --out benchmarks/results/calibrations_cpu.jsonl --page docs/studies.md

For every task and seed a model is fitted to the shots, and one more per fold, which scores the shots held out. Every
kind of calibration is made from these same models and measured on the same test texts. Each finished draw is a line of
the file, and a second run computes only the missing ones. Then the table between `<!-- calibrations -->` and
`<!-- end -->` is written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.draws import drawn, run
from benchmarks.table import commit
from ofa.adaptation import adapt
from ofa.comparison.outcomes import Draw, Problem
from ofa.evaluation.scores import metrics
from ofa.methods import method
from ofa.methods.calibrating import KINDS, calibration, held_out_by_folds
from ofa.models.load import LoadedModel
from ofa.report.formatting import percent
from ofa.report.statistics import FEWEST_PAIRS, Difference, paired_difference

BASE = "fixed"
"""The default, which the other kinds are set against."""

MEASURED = ("accuracy", "negative_log_likelihood", "expected_calibration_error", "brier_score")


@dataclass(frozen=True)
class Line:
    """One draw: the metrics and the temperature of every kind, and thread CPU seconds of the fit and of the folds."""

    model: str
    dtype: str
    task: str
    seed: int
    shots: int
    test_size: int
    temperatures: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, float]]
    fit_seconds: float
    fold_seconds: float
    commit: str

    @property
    def draw(self) -> Draw:
        """What makes two kinds comparable."""
        return Draw(Problem(self.task, self.shots, self.test_size, ""), self.seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the missing draws, and write the table into the page."""
    run("calibrations", __doc__, Line, measured, table, arguments)


def measured(
    loaded: LoadedModel, task: str, seed: int, shots: int, test_size: int, settings: Mapping[str, int]
) -> Line:
    """Fit the folds and the shots once, and calibrate the model of the shots in every way."""
    data, examples, tested = drawn(task, shots, seed, test_size)
    fit = method("norm-tuning")
    start = time.thread_time()
    held_out = held_out_by_folds(
        lambda part: fit(loaded.model, loaded.tokenizer, data.task, part, seed, **settings), data.task, examples
    )
    folded = time.thread_time()
    with adapt(loaded.model, loaded.tokenizer, data, shots, seed, calibrate="none", **settings).predictor as predictor:
        fitted = time.thread_time()
        found = {kind: calibration(predictor.scorer, kind, held_out) for kind in KINDS}
        scores = predictor.scorer.log_probabilities([example.text for example in tested])
    truth = [example.label for example in tested]
    measures = {
        kind: asdict(metrics((made.apply(scores) if made else scores).exp(), truth, data.task.labels))
        for kind, made in found.items()
    }
    return Line(
        model=loaded.name,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        task=Path(task).name,
        seed=seed,
        shots=shots,
        test_size=len(tested),
        temperatures={kind: made.temperature if made else 1.0 for kind, made in found.items()},
        metrics={kind: {name: measure[name] for name in MEASURED} for kind, measure in measures.items()},
        fit_seconds=round(fitted - folded, 1),
        fold_seconds=round(folded - start, 1),
        commit=commit(),
    )


def table(lines: Sequence[Line]) -> str:
    """A row per kind: means over the draws, and the likelihood against that of the default."""
    base = _values(lines, BASE, "negative_log_likelihood")
    rows = [
        f"| {len(lines)} draws | temperature | accuracy | NLL | ECE | Brier | NLL against {BASE} | better / worse |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        temperatures = [line.temperatures[kind] for line in lines]
        accuracy, *others = (_mean(_values(lines, kind, name)) for name in MEASURED)
        told = [kind, f"{min(temperatures):.2f} to {max(temperatures):.2f}", percent(accuracy)]
        told += [f"{value:.3f}" for value in others]
        found = None if kind == BASE else paired_difference(_values(lines, kind, "negative_log_likelihood"), base)
        rows.append(f"| {' | '.join([*told, *_against(found)])} |".replace("-", "−"))
    return "\n".join(rows) + "\n"


def _values(lines: Sequence[Line], kind: str, name: str) -> dict[Draw, float]:
    return {line.draw: line.metrics[kind][name] for line in lines}


def _mean(values: Mapping[Draw, float]) -> float:
    return sum(values.values()) / len(values)


def _against(found: Difference | None) -> list[str]:
    if found is None:
        return ["–", "–"]
    ends = found.interval if found.pairs >= FEWEST_PAIRS else None
    within = f" [{ends.low:+.3f}, {ends.high:+.3f}]" if ends else ""
    return [f"{found.mean:+.3f}{within}", f"{found.losses} / {found.wins}"]  # less is better


if __name__ == "__main__":
    main()
