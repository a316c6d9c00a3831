"""How much of the step ratio J a single step and a single token hold, on pretrained and on random weights.

python -m benchmarks.step_lengths --out benchmarks/results/step_lengths_cpu.csv --encoder all-MiniLM-L6-v2

For every choice of `tokens`: J; the largest of its ratios as a share of J; the longest token, the one with the longest
single update, as the share by which J falls without it; the number of tokens that are left out. `--encoder` is a folder
for `transformers.AutoModel`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

import ofa
from benchmarks.curvature import FAMILIES, random_model
from benchmarks.table import commit, cpu, significant, writing
from ofa.regularizers import objectives
from ofa.regularizers.options import RegularizerOptions
from ofa.tasks import load_task

TASKS = ("reviews", "questions")
TEXTS = 8
TOKENS = get_args(RegularizerOptions.model_fields["tokens"].annotation)


@dataclass(frozen=True)
class Row:
    """One number: J, largest_step, longest_token (shares of J), or left_out (tokens of a sequence)."""

    model: str
    texts: str
    tokens: str
    metric: str
    value: float
    device: str
    torch: str
    commit: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--encoder", type=Path, action="append", default=[], help="folder of an encoder; repeatable")
    options = parser.parse_args(arguments)
    origin = cpu(), torch.__version__, commit()
    with writing(options.out, Row) as write:
        for name, texts, model, batch in _subjects(options.encoder):
            for tokens in TOKENS:
                found = shares(model, batch, tokens)
                write(Row(name, texts, tokens, metric, significant(value), *origin) for metric, value in found.items())
                told = ", ".join(f"{metric} {value:.3g}" for metric, value in found.items())
                print(f"{name:22} {texts:10} {tokens:9} {told}", flush=True)


def shares(model: nn.Module, batch: Mapping[str, Any], tokens: str) -> dict[str, float]:
    """J and what holds it, means over the sequences."""
    with ofa.fused_regularizers(model, 1.0, 0.0, tokens=tokens) as regularizers, torch.no_grad():
        with regularizers.measuring():
            model(**batch)
        measured = regularizers.measurements
    squares, ratios, counted = measured.token_squares, measured.ratios, measured.counted
    assert squares is not None
    assert ratios is not None
    counted = torch.ones_like(squares[0], dtype=torch.bool) if counted is None else counted
    squares = torch.where(counted, squares, 0)
    longest = squares.amax(0).argmax(1)
    without = _total(squares.scatter(2, longest.view(1, -1, 1).expand(len(squares), -1, 1), 0))
    total = ratios.sum(0)
    real = batch.get("attention_mask", torch.ones_like(counted)).bool()
    return {
        "J": float(total.mean()),
        "largest_step": float((ratios.amax(0) / total).mean()),
        "longest_token": float("nan") if tokens == "last" else float((1 - without / total).mean()),
        "left_out": float((real & ~counted).sum(1).float().mean()),
    }


def _total(squares: Tensor) -> Tensor:
    return objectives.ratios(objectives.step_norms(squares.sum(2))).sum(0)


def _subjects(encoders: Sequence[Path]) -> Iterator[tuple[str, str, nn.Module, dict[str, Any]]]:
    from transformers import AutoModel, AutoTokenizer

    loaded = ofa.load_model("embedded", device="cpu")
    for task in TASKS:
        yield "smollm2_135m_instruct", task, loaded.model, _batch(loaded.tokenizer, task)
    for folder in encoders:
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        for task in TASKS:
            yield folder.name, task, model, _batch(tokenizer, task)
    for family in FAMILIES:
        model = random_model(family)
        ids = torch.randint(3, model.config.vocab_size, (TEXTS, 48), generator=torch.Generator().manual_seed(0))
        yield f"random {family}", "random", model, {"input_ids": ids}


def _batch(tokenizer: Any, task: str) -> dict[str, Any]:
    data = load_task(task)
    prompts = [data.task.prompt(example.text) for example in data.train[:TEXTS]]
    return dict(tokenizer(prompts, return_tensors="pt", padding=True))


if __name__ == "__main__":
    main()
