"""The error of each estimator in each dtype, and the best step of finite differences.

python -m benchmarks.precision --out benchmarks/results/precision_cpu.csv

For every estimator and dtype, the error of the traces h_t and of the gradient of H against float64 with the same
rounded weights and the same probes, which excludes the rounding of weights and the noise of probes. (Finite differences
are compared with those in float64, whose ε is small.) Errors of traces are root
mean squares over the steps of some layers and the sequences, relative to that of the traces; errors of gradients are
the median over the norms of the first layers of ‖g − g₆₄‖/‖g₆₄‖. `noise` is the error of the probes themselves in
float64, which should be much larger. `hutchinson` has one row per δ, the displacement relative to the token's length
(`default`: `epsilon=None`), and one per ε for all layers.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import __version__ as transformers_version

import ofa
from benchmarks.table import commit, cpu, significant, writing
from ofa.regularizers.estimators import hutchinson
from ofa.tasks import load_task

GROUPS = {"small": {"all": range(6)}, "smollm2_135m_instruct": {"1-3": range(2, 8), "10-19": range(20, 40)}}
GROUPS["smollm2_135m_instruct"] |= {"20-29": range(40, 60)}
"""Steps of some layers, without the embedded model's layer 0, whose traces are ten times the others'."""

ESTIMATORS = ("exact", "hutchinson")
RELATIVE = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ABSOLUTE = (1e-3, 1e-2, 1e-1, 1.0)
GRADIENT_LAYERS = 4


@dataclass(frozen=True)
class Row:
    """One number; `metric` is error, gradient_error or noise."""

    model: str
    estimator: str
    dtype: str
    step: str
    layers: str
    metric: str
    value: float
    device: str
    torch: str
    transformers: str
    commit: str


@dataclass(frozen=True)
class Precision:
    """The dtype of a model, and of autocast."""

    dtype: torch.dtype
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return name if self.autocast is None else f"{name}, autocast to {str(self.autocast).removeprefix('torch.')}"

    def context(self) -> Any:
        """Autocast on the CPU, or nothing."""
        return nullcontext() if self.autocast is None else torch.autocast("cpu", dtype=self.autocast)


PRECISIONS = (
    Precision(torch.float32),
    Precision(torch.float16),
    Precision(torch.bfloat16),
    Precision(torch.float32, torch.bfloat16),
)
DOUBLE = Precision(torch.float64)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--model", choices=sorted(GROUPS), action="append", help="which ones; both without it")
    options = parser.parse_args(arguments)
    origin = cpu(), torch.__version__, transformers_version, commit()
    with writing(options.out, Row) as write:
        for name in options.model or GROUPS:
            model, batch = _small() if name == "small" else _embedded()
            for precision in PRECISIONS:
                print(f"{name}, {precision}", flush=True)
                for estimator, step, layers, metric, value in _measure(name, model, batch, precision):
                    row = Row(name, estimator, str(precision), step, layers, metric, significant(value), *origin)
                    write([row])


def _measure(
    name: str, original: nn.Module, batch: dict[str, Tensor], precision: Precision
) -> Iterator[tuple[str, str, str, str, float]]:
    """Estimator, step, layers, metric and value of one model in one dtype."""
    model = copy.deepcopy(original).to(precision.dtype)
    double = copy.deepcopy(model).double()
    truth = {estimator: traces(double, batch, DOUBLE, estimator) for estimator in ESTIMATORS}
    front, double_front = _first_layers(model), _first_layers(double)
    gradients = {estimator: gradient(double_front, batch, DOUBLE, estimator) for estimator in ESTIMATORS}
    for estimator in ESTIMATORS:
        for step, options in _steps(estimator):
            with _Stepping(options.pop("delta", None)):
                found = traces(model, batch, precision, estimator, **options)
                slopes = gradient(front, batch, precision, estimator, **options)
            errors = [float((g - own).norm() / own.norm()) for g, own in zip(slopes, gradients[estimator], strict=True)]
            yield estimator, step, f"0-{len(_layers(front)) - 1}", "gradient_error", median(errors)
            for group, picked in GROUPS[name].items():
                yield estimator, step, group, "error", _error(found, truth[estimator], picked)
                if step == "default":
                    yield estimator, step, group, "noise", _error(truth[estimator], truth["exact"], picked)


def traces(model: nn.Module, batch: dict[str, Tensor], precision: Precision, estimator: str, **options: Any) -> Tensor:
    """h_t of every step and sequence, (T, B), float64, with the same probes in every call."""
    ofa.tune_norms(model)
    regularizers = ofa.fused_regularizers(model, 0.0, 1.0, estimator=estimator, gradient="full", seed=1, **options)
    with regularizers, torch.no_grad(), regularizers.measuring(), precision.context():
        model(**batch)
        found = regularizers.measurements.traces
    assert found is not None
    return found.double()


def gradient(
    model: nn.Module, batch: dict[str, Tensor], precision: Precision, estimator: str, **options: Any
) -> list[Tensor]:
    """The gradient of H in every scale but the last, which comes after all steps; float64."""
    params = ofa.tune_norms(model)[:-1]
    with ofa.fused_regularizers(
        model, 0.0, 1.0, estimator=estimator, gradient="full", seed=1, **options
    ) as regularizers:
        with precision.context():
            model(**batch)
        return [found.double() for found in torch.autograd.grad(regularizers.penalty(), params)]


def _steps(estimator: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "default", {}
    if estimator == "hutchinson":
        yield from ((f"δ = {delta:g}", {"delta": delta}) for delta in RELATIVE)
        yield from ((f"ε = {epsilon:g}", {"epsilon": epsilon}) for epsilon in ABSOLUTE)


class _Stepping:
    """Uses δ for every dtype in this context; None uses the dtypes' own."""

    def __init__(self, delta: float | None) -> None:
        self._own = hutchinson.DELTA
        self._delta = delta

    def __enter__(self) -> None:
        if self._delta is not None:
            hutchinson.DELTA = dict.fromkeys(self._own, self._delta)

    def __exit__(self, *error: object) -> None:
        hutchinson.DELTA = self._own


def _error(found: Tensor, truth: Tensor, picked: range) -> float:
    rows = list(picked)
    return float((found[rows] - truth[rows]).square().mean().sqrt() / truth[rows].square().mean().sqrt())


def _layers(model: nn.Module) -> nn.ModuleList:
    found = model.get_submodule("model.layers")
    assert isinstance(found, nn.ModuleList)
    return found


def _first_layers(model: Any) -> Any:
    """A copy of the model with only its first layers."""
    front = copy.deepcopy(model)
    front.model.layers = front.model.layers[:GRADIENT_LAYERS]
    front.config.num_hidden_layers = len(front.model.layers)
    return front


def _small() -> tuple[nn.Module, dict[str, Tensor]]:
    """Three random layers with curvature; four sequences of twelve tokens."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=2, vocab_size=64)).eval()
    for parameter in model.parameters():
        spread = 0.3 if parameter.dim() == 1 else 0.1
        parameter.data = (1.0 if parameter.dim() == 1 else 0.0) + spread * torch.randn_like(parameter)
    return model, {"input_ids": torch.randint(3, 64, (4, 12))}


def _embedded() -> tuple[nn.Module, dict[str, Tensor]]:
    """The embedded model, and prompts of the demo's reviews."""
    loaded = ofa.load_model("embedded", device="cpu")
    data = load_task("reviews")
    prompts = [data.task.prompt(example.text) for example in data.train[:4]]
    return loaded.model, dict(loaded.tokenizer(prompts, return_tensors="pt", padding=True))


if __name__ == "__main__":
    main()
