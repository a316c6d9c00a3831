"""Compares the gradients of the sharpness, and the size of its radial terms, on the embedded model and random ones.

python -m benchmarks.curvature --out benchmarks/results/curvature_cpu.csv

`length` and `cosine`: gradients of H in all γ, through everything, with every σ held fixed, and in P alone. `left_out`:
relative errors of a branch's gradient and trace against those with exact radial terms.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ofa
from benchmarks.table import commit, cpu, significant, writing
from ofa.regularizers.closed_form import branch_trace
from ofa.tasks import load_task

TASKS = ("reviews", "questions")
SHOTS = 4
MODES = ("none", "channels")
WIDE = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32},
    "phi3": {},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Random models of width 256, the worst case: without massive channels, eight hold the least of the radial terms."""


@dataclass(frozen=True)
class Row:
    """One number: a length, a cosine with another gradient, or a relative error of the median or worst branch."""

    model: str
    texts: str
    part: str
    variant: str
    metric: str
    value: float
    device: str
    torch: str
    commit: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both parts and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    options = parser.parse_args(arguments)
    origin = cpu(), torch.__version__, commit()
    with writing(options.out, Row) as write:
        for model, texts, found in _measure():
            rows = [Row(model, texts, *keys, significant(value), *origin) for keys, value in found.items()]
            write(rows)
            for row in rows:
                print(f"{row.model:22} {row.texts:10} {row.part:9} {row.variant:24} {row.metric:18} {row.value:g}")


def _measure() -> Iterator[tuple[str, str, dict[tuple[str, str, str], float]]]:
    loaded = ofa.load_model("embedded", device="cpu")
    ofa.tune_norms(loaded.model)
    for task in TASKS:
        data = load_task(task)
        prompts = [data.task.prompt(example.text) for example in data.train[:SHOTS]]
        batch = dict(loaded.tokenizer(prompts, return_tensors="pt", padding=True))
        yield "smollm2_135m_instruct", task, gradients(loaded.model, batch) | radial(loaded.model, batch)
    for name in FAMILIES:
        model = random_model(name)
        ofa.tune_norms(model)
        yield name, "random", radial(model, {"input_ids": torch.randint(3, 256, (2, 64))})


def random_model(family: str) -> nn.Module:
    """A model of `FAMILIES` with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {**WIDE, "vocab_size": 256, "intermediate_size": 512, "pad_token_id": 0, **FAMILIES[family]}
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    return model


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[tuple[str, str, str], float]:
    """Lengths of the gradients of H in all γ, and cosines between them."""
    found = {
        "everything": _gradient(model, batch, gradient="full"),
        "preconditioner": _gradient(model, batch, radial="exact"),
    }
    with pytest.MonkeyPatch.context() as patch:
        own = branch_trace.NormAt.hat
        patch.setattr(branch_trace.NormAt, "hat", lambda self: (lambda hat, rstd: (hat, rstd.detach()))(*own(self)))
        found["everything but σ"] = _gradient(model, batch, gradient="full")
    result = {("gradients", name, "length"): float(value.norm()) for name, value in found.items()}
    for one, other in (
        ("everything", "everything but σ"),
        ("everything", "preconditioner"),
        ("everything but σ", "preconditioner"),
    ):
        cosine = torch.cosine_similarity(found[one], found[other], dim=0)
        result["gradients", f"{one}, {other}", "cosine"] = float(cosine)
    return result


def radial(model: nn.Module, batch: dict[str, Tensor]) -> dict[tuple[str, str, str], float]:
    """Errors of traces and of gradients, branch by branch, without the radial terms and with eight channels of them."""
    exact = _by_branch(model, batch, "exact")
    result = {}
    for mode in MODES:
        found = _by_branch(model, batch, mode)
        for metric, part in (("trace", 0), ("gradient", 1)):
            errors = [float((a[part] - b[part]).norm() / b[part].norm()) for a, b in zip(found, exact, strict=True)]
            result["left_out", mode, f"{metric}_median"] = median(errors)
            result["left_out", mode, f"{metric}_worst"] = max(errors)
    return result


def _gradient(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    scales = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ofa.fused_regularizers(model, 0.0, 1.0, estimator="exact", **options) as reg:
        model(**batch)
        parts = torch.autograd.grad(reg.penalty(), scales, allow_unused=True)
    return torch.cat([part for part in parts if part is not None]).double()


def _by_branch(model: nn.Module, batch: dict[str, Tensor], mode: str) -> list[tuple[Tensor, Tensor]]:
    """Traces of the sequences, and the gradient of their sum in γ, for every branch."""
    found: list[tuple[Tensor, Tensor]] = []
    own = branch_trace.branch_trace

    def watched(*args: Any, **kwargs: Any) -> Any:
        trace = own(*args, **kwargs)
        assert trace.gradient is not None
        found.append((trace.values, trace.gradient(torch.ones_like(trace.values))))
        return trace

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ofa.regularizers.estimators.exact.branch_trace", watched)
        with ofa.fused_regularizers(model, 0.0, 1.0, estimator="exact", radial=mode):
            model(**batch)
    return found


if __name__ == "__main__":
    main()
