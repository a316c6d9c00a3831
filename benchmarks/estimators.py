"""Error of each estimator's traces on a pretrained model, and the cost of a training step with it.

python -m benchmarks.estimators --out benchmarks/results/estimators_cpu.csv --plot docs/figures/estimators.png

Errors are against the closed form in float64 on the same weights. Errors are of single passes in float32: the root mean
square over repetitions with other probes, sequences and the steps of a group of layers, relative to the root mean
square of the true traces there. Costs are counted FLOPs of a training step of that model, relative to a plain one.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ofa
from benchmarks.cost import flops_of
from benchmarks.plot_estimators import plot
from benchmarks.table import commit, cpu, significant, writing
from benchmarks.workloads import SMOLLM2_135M, build
from ofa.tasks import load_task

SAMPLES = (1, 4, 16)
"""Probes N of `hutchinson`."""

REPETITIONS = 8
LAYERS = {"early": (1, 2), "middle": (14, 15), "late": (28, 29)}
"""Layers of SmolLM2-135M; not the first, whose MLP has a trace larger than all others together."""

BRANCHES = ("attention", "mlp")
TASK = "reviews"
SEQUENCES = 4


@dataclass(frozen=True)
class Row:
    """One number; `metric` is error (relative RMS), spread (relative deviation over probes) or flops_ratio."""

    benchmark: str
    estimator: str
    samples: int
    layers: str
    branch: str
    metric: str
    value: float
    device: str
    torch: str
    commit: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to draw")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="passes with other probes")
    options = parser.parse_args(arguments)
    with writing(options.out, Row) as write:
        rows = list(_measure(options.repetitions))
        write(rows)
    if options.plot:
        plot(options.out, options.plot)


def traces(model: Any, batch: dict[str, Tensor], estimator: str, samples: int, passes: int) -> Tensor:
    """h_t of every pass, step and sequence, (passes, T, B), float64."""
    measured = []
    regularizers = ofa.fused_regularizers(model, 0.0, 1.0, estimator=estimator, samples=samples, seed=1)
    with regularizers, torch.no_grad(), regularizers.measuring():
        for _ in range(passes):
            model(**batch)
            found = regularizers.measurements.traces
            assert found is not None
            measured.append(found.double())
    return torch.stack(measured)


def _measure(repetitions: int) -> Iterator[Row]:
    loaded = ofa.load_model("embedded", device="cpu")
    ofa.tune_norms(loaded.model)
    data = load_task(TASK)
    prompts = [data.task.prompt(example.text) for example in data.train[:SEQUENCES]]
    batch = dict(loaded.tokenizer(prompts, return_tensors="pt", padding=True))
    truth = traces(copy.deepcopy(loaded.model).double(), batch, "exact", 1, 1)[0]
    costs = build(SMOLLM2_135M.of(10, 48))
    plain = flops_of(SMOLLM2_135M.of(10, 48), costs, None, 1)
    origin = cpu(), torch.__version__, commit()
    budgets = [("exact", 1), *(("hutchinson", count) for count in SAMPLES)]
    for name, samples in budgets:
        passes = 1 if name == "exact" else repetitions
        found = traces(loaded.model, batch, name, samples, passes)
        print(f"{name} N={samples}", flush=True)
        for (layers, branch), picked in _groups().items():
            size = truth[picked].square().mean().sqrt()
            error = (found[:, picked] - truth[picked]).square().mean().sqrt() / size
            spread = (found[:, picked] - found[:, picked].mean(0)).square().mean().sqrt() / size
            for metric, value in (("error", error), ("spread", spread)):
                value = significant(float(value))
                yield Row("smollm2_135m_instruct", name, samples, layers, branch, metric, value, *origin)
        ratio = flops_of(SMOLLM2_135M.of(10, 48), costs, name, samples) / plain
        yield Row("smollm2_135m_instruct", name, samples, "all", "all", "flops_ratio", significant(ratio), *origin)


def _groups() -> dict[tuple[str, str], list[int]]:
    """Indices of the steps of every group of layers and branch."""
    return {
        (name, branch): [2 * layer + offset for layer in layers]
        for name, layers in LAYERS.items()
        for offset, branch in enumerate(BRANCHES)
    }


if __name__ == "__main__":
    main()
