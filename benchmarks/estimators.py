"""Error of each estimator's traces on a pretrained model, and the cost of a training step with it.

python -m benchmarks.estimators --out benchmarks/results/estimators_cpu.csv --plot docs/figures/estimators.png

Errors are against the closed form in float64 on the same weights. Errors are of single passes in float32: the root mean
square over repetitions with other probes, sequences and the steps of a group of layers, relative to the root mean
square of the true traces there; of the gradient of H in all scales (in P alone, as in training) likewise. N and ε of
`hutchinson` are swept. Costs are counted FLOPs of a training step of that model, relative to a plain one.
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

SAMPLES = (1, 2, 4, 8)
"""Probes N of `hutchinson`."""

EPSILONS = (1e-4, 1e-3, 1e-2, 1e-1)
"""Its finite-difference steps, measured with one N; otherwise each branch has its own."""

OF_EPSILONS = 4
"""That N."""

REPETITIONS = 4
LAYERS = {"early": (1, 2), "middle": (14, 15), "late": (28, 29)}
"""Layers of SmolLM2-135M; not the first, whose MLP has a trace larger than all others together."""

BRANCHES = ("attention", "mlp")
TASK = "reviews"
SEQUENCES = 4


@dataclass(frozen=True)
class Row:
    """One number; `metric` is error (relative RMS), spread (relative deviation over probes) or flops_ratio.

    `branch` is "gradient" for the gradient in all scales; `epsilon` is a number or "auto".
    """

    benchmark: str
    estimator: str
    samples: int
    epsilon: str
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
        for row in _measure(options.repetitions):
            write([row])
    if options.plot:
        plot(options.out, options.plot)


def measure(
    model: Any, batch: dict[str, Tensor], estimator: str, samples: int, epsilon: float | None, passes: int
) -> tuple[Tensor, Tensor]:
    """h_t of every pass, step and sequence, (passes, T, B), and ∂H/∂γ of every pass, (passes, 1, γ), float64."""
    traces, gradients = [], []
    scales = [parameter for parameter in model.parameters() if parameter.requires_grad]
    how: dict[str, Any] = {"estimator": estimator, "samples": samples, "epsilon": epsilon, "radial": "exact"}
    with ofa.fused_regularizers(model, 0.0, 1.0, seed=1, **how) as regularizers:
        for _ in range(passes):
            model(**batch)
            found = regularizers.measurements
            assert found.traces is not None
            assert found.sharpness is not None
            parts = torch.autograd.grad(found.sharpness, scales, allow_unused=True)
            gradients.append(torch.cat([part.double() for part in parts if part is not None]))
            traces.append(found.traces.detach().double())
            regularizers.forget()
    return torch.stack(traces), torch.stack(gradients).unsqueeze(1)


def _measure(repetitions: int) -> Iterator[Row]:
    loaded = ofa.load_model("embedded", device="cpu")
    ofa.tune_norms(loaded.model)
    data = load_task(TASK)
    prompts = [data.task.prompt(example.text) for example in data.train[:SEQUENCES]]
    batch = dict(loaded.tokenizer(prompts, return_tensors="pt", padding=True))
    truth = [found[0] for found in measure(_in_float64(loaded.model), batch, "exact", 1, None, 1)]
    costs = build(SMOLLM2_135M.of(10, 48))
    plain = flops_of(SMOLLM2_135M.of(10, 48), costs, None, 1)
    origin = cpu(), torch.__version__, commit()
    swept = [*((count, None) for count in SAMPLES), *((OF_EPSILONS, step) for step in EPSILONS)]
    budgets = [("exact", 1, None), *(("hutchinson", *one) for one in swept)]
    for name, samples, epsilon in budgets:
        passes = 1 if name == "exact" else repetitions
        traces, gradients = measure(loaded.model, batch, name, samples, epsilon, passes)
        step = "auto" if epsilon is None else f"{epsilon:g}"
        print(f"{name} N={samples} ε={step}", flush=True)
        pairs = {group: (traces[:, picked], truth[0][picked]) for group, picked in _groups().items()}
        pairs["all", "gradient"] = gradients, truth[1]
        for (layers, branch), (found, true) in pairs.items():
            size = true.square().mean().sqrt()
            error = (found - true).square().mean().sqrt() / size
            spread = (found - found.mean(0)).square().mean().sqrt() / size
            for metric, value in (("error", error), ("spread", spread)):
                value = significant(float(value))
                yield Row("smollm2_135m_instruct", name, samples, step, layers, branch, metric, value, *origin)
        if epsilon is None:
            ratio = significant(flops_of(SMOLLM2_135M.of(10, 48), costs, name, samples) / plain)
            yield Row("smollm2_135m_instruct", name, samples, step, "all", "all", "flops_ratio", ratio, *origin)


def _in_float64(model: Any) -> Any:
    copied = copy.deepcopy(model).double()
    ofa.tune_norms(copied)
    return copied


def _groups() -> dict[tuple[str, str], list[int]]:
    """Indices of the steps of every group of layers and branch."""
    return {
        (name, branch): [2 * layer + offset for layer in layers]
        for name, layers in LAYERS.items()
        for offset, branch in enumerate(BRANCHES)
    }


if __name__ == "__main__":
    main()
