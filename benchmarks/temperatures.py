"""What a fixed temperature does to the probabilities of trained models: relative steps, one step size, and LoRA.

python -m benchmarks.temperatures --out benchmarks/results/temperatures_cpu.jsonl --page docs/studies.md

A temperature divides the log-probabilities of the labels and never changes a label, so that each model is fitted once.
Each finished draw is a line of the file, and a second run computes only the missing ones. Then the table between
`<!-- temperatures -->` and `<!-- end -->` is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.draws import drawn, run
from benchmarks.table import commit
from ofa.comparison.outcomes import Draw, Problem
from ofa.evaluation.calibration import Calibration
from ofa.evaluation.scores import metrics
from ofa.methods import method
from ofa.models.load import LoadedModel
from ofa.report.formatting import percent
from ofa.report.statistics import FEWEST_PAIRS, paired_difference

ROWS: Mapping[str, tuple[str, Mapping[str, bool]]] = {
    "relative steps": ("norm-tuning", {}),
    "one step size": ("norm-tuning", {"relative": False}),
    "LoRA": ("lora", {}),
}
TEMPERATURES = (1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Line:
    """One draw: accuracy, and for each temperature in turn likelihood and calibration error, of every row."""

    model: str
    dtype: str
    task: str
    seed: int
    shots: int
    test_size: int
    accuracy: Mapping[str, float]
    likelihood: Mapping[str, Sequence[float]]
    calibration: Mapping[str, Sequence[float]]
    commit: str

    @property
    def draw(self) -> Draw:
        """What makes two rows comparable."""
        return Draw(Problem(self.task, self.shots, self.test_size, ""), self.seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the missing draws, and write the table into the page."""
    run("temperatures", __doc__, Line, measured, table, arguments)


def measured(
    loaded: LoadedModel, task: str, seed: int, shots: int, test_size: int, settings: Mapping[str, int]
) -> Line:
    """Fit every row to the shots, and measure it at every temperature."""
    data, examples, tested = drawn(task, shots, seed, test_size)
    truth = [example.label for example in tested]
    found = {}
    for row, (name, own) in ROWS.items():
        fit = method(name)
        with fit(loaded.model, loaded.tokenizer, data.task, examples, seed, **own, **settings) as predictor:
            scores = predictor.scorer.log_probabilities([example.text for example in tested])
        found[row] = [
            metrics(Calibration(temperature).apply(scores).exp(), truth, data.task.labels)
            for temperature in TEMPERATURES
        ]
    return Line(
        model=loaded.name,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        task=Path(task).name,
        seed=seed,
        shots=shots,
        test_size=len(tested),
        accuracy={row: part[0].accuracy for row, part in found.items()},
        likelihood={row: [one.negative_log_likelihood for one in part] for row, part in found.items()},
        calibration={row: [one.expected_calibration_error for one in part] for row, part in found.items()},
        commit=commit(),
    )


def table(lines: Sequence[Line]) -> str:
    """A row for each method: means over the draws, and the likelihood at 1.5 against that at 1."""
    at = " | ".join(f"{name} at {temperature:g}" for name in ("NLL", "ECE") for temperature in TEMPERATURES)
    rows = [
        f"| {len(lines)} draws | accuracy | {at} | NLL, 1.5 against 1 | better |",
        f"|{'---|' * (2 * len(TEMPERATURES) + 4)}",
    ]
    for row in ROWS:
        measures = [
            f"{sum(getattr(line, name)[row][place] for line in lines) / len(lines):.3f}"
            for name in ("likelihood", "calibration")
            for place in range(len(TEMPERATURES))
        ]
        accuracy = sum(line.accuracy[row] for line in lines) / len(lines)
        place = TEMPERATURES.index(1.5)
        found = paired_difference(
            {line.draw: line.likelihood[row][place] for line in lines},
            {line.draw: line.likelihood[row][0] for line in lines},
        )
        assert found is not None
        ends = found.interval if found.pairs >= FEWEST_PAIRS else None
        gained = f"{found.mean:+.3f}" + (f" [{ends.low:+.3f}, {ends.high:+.3f}]" if ends else "")
        told = [row, percent(accuracy), *measures, gained.replace("-", "−"), f"{found.losses} of {found.pairs}"]
        rows.append(f"| {' | '.join(told)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
