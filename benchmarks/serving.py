"""Latency of a model with its adapter, merged and in use, and of the base, in interleaved rounds of one run.

python -m benchmarks.serving --out benchmarks/results/serving_cpu.csv

Before timing, all models with the adapter must give the same logits, in float32 bit-identical ones. The base is loaded
twice; the ratio of the second copy to the first shows the machine's noise. Processor time, of all threads of this
process, is stated with wall-clock time: other work on the machine affects it less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

import ofa
from benchmarks.table import commit, cpu, significant, writing
from ofa.models.load import load_model

ROUNDS = 20
BASE, SECOND_BASE, MERGED, OFA, PEFT = "base", "base_again", "merged", "adapter_ofa", "adapter_peft"


@dataclass(frozen=True)
class Workload:
    """One request: a forward pass over a batch, or as many tokens generated greedily after each sequence."""

    name: str
    sequences: int
    tokens: int
    generated: int = 0


WORKLOADS = (
    Workload("forward", 1, 48),
    Workload("forward", 10, 48),
    Workload("generate", 1, 48, generated=16),
)


class Seconds(NamedTuple):
    """Times of one call."""

    wall: float
    processor: float


@dataclass(frozen=True)
class Row:
    """One number of the table; a ratio is the median over the rounds of time over the base's in the same round."""

    benchmark: str
    workload: str
    sequences: int
    tokens: int
    generated: int
    variant: str
    metric: str
    value: float
    unit: str
    rounds: int
    dtype: str
    device: str
    torch: str
    transformers: str
    peft: str
    commit: str


def variants(base: str, adapter: Path, merged: Path, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The models by name, each with its own weights, loaded as a server would load them."""

    def bare(name: str | Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)

    with_scales = bare(base)
    ofa.load_adapter(with_scales, adapter)
    models = {
        BASE: bare(base),
        SECOND_BASE: bare(base),
        MERGED: bare(merged),
        OFA: with_scales,
        PEFT: peft.PeftModel.from_pretrained(bare(base), adapter),
    }
    return {name: _with_memory_of_its_own(model.eval().to(device)) for name, model in models.items()}


def requests(workload: Workload, models: dict[str, Any], device: str) -> dict[str, Callable[[], Tensor]]:
    """The same request to every model."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (workload.sequences, workload.tokens), generator=generator).to(device)
    mask = torch.ones_like(ids)

    def request(model: Any) -> Callable[[], Tensor]:
        if not workload.generated:
            return lambda: model(input_ids=ids, attention_mask=mask).logits
        length = {"min_new_tokens": workload.generated, "max_new_tokens": workload.generated}
        return lambda: model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **length)

    return {name: request(model) for name, model in models.items()}


@torch.no_grad()
def interleaved(calls: dict[str, Callable[[], Tensor]], rounds: int, device: str) -> dict[str, list[Seconds]]:
    """Times of every call in every round, after a warm-up round; each round begins with another call."""
    names = list(calls)
    times: dict[str, list[Seconds]] = {name: [] for name in names}
    for name in names:
        calls[name]()
    for index in range(rounds):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(_timed(calls[name], device))
    return times


def ratio(values: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Median over the rounds of time over the base's time in the same round, and its 20th and 80th percentile."""
    ratios = [value / own for value, own in zip(values, base, strict=True)]
    low, *_, high = quantiles(ratios, n=5, method="inclusive") if len(ratios) > 1 else ratios * 2
    return median(ratios), low, high


@torch.no_grad()
def check_answers(models: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Check that merged and in use give the same logits, and the base others."""
    calls = requests(WORKLOADS[0], models, device)
    expected = calls[MERGED]()
    for name in (OFA, PEFT) if dtype == torch.float32 else (PEFT,):
        torch.testing.assert_close(calls[name](), expected, rtol=0, atol=0)
    assert not torch.equal(calls[BASE](), expected)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all workloads and write the table."""
    options = _parser().parse_args(arguments)
    dtype, origin = getattr(torch, options.dtype), _origin(options)
    with tempfile.TemporaryDirectory() as folder, writing(options.out, Row) as write:
        base, adapter, merged = prepared(options.model, options.dtype, Path(folder))
        models = variants(base, adapter, merged, dtype, options.device)
        check_answers(models, dtype, options.device)
        for workload in WORKLOADS:
            times = interleaved(requests(workload, models, options.device), options.rounds, options.device)
            write(_rows(workload, times, Path(base).name, options.rounds, origin))


def prepared(model: str | None, dtype: str, folder: Path) -> tuple[str, Path, Path]:
    """The base's folder, an adapter with all scales changed, and the merged checkpoint."""
    loaded = load_model(model, dtype=dtype, device="cpu")
    with torch.no_grad():
        for scale in ofa.tune_norms(loaded.model):
            scale.mul_(torch.linspace(0.95, 1.05, scale.numel()))
    adapter = ofa.save_adapter(loaded.model, folder / "adapter")
    merged = ofa.merge(loaded.model, adapter, folder / "merged", tokenizer=loaded.tokenizer)
    return str(loaded.path or loaded.name), adapter, merged


def _with_memory_of_its_own(model: Any) -> Any:
    """The model with its weights copied from the mapped file: models of one file would share the processor's cache."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _timed(call: Callable[[], Tensor], device: str) -> Seconds:
    _wait(device)
    wall, processor = time.perf_counter(), time.process_time()
    call()
    _wait(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _origin(options: argparse.Namespace) -> tuple[str, ...]:
    """Dtype, device, versions and commit at the start of the run."""
    device = cpu() if options.device == "cpu" else torch.cuda.get_device_name()
    return options.dtype, device, torch.__version__, transformers.__version__, peft.__version__, commit()


def _rows(
    workload: Workload, times: dict[str, list[Seconds]], name: str, rounds: int, origin: tuple[str, ...]
) -> Iterator[Row]:
    size = workload.name, workload.sequences, workload.tokens, workload.generated
    print(f"{name}: {workload.name}, {workload.sequences}x{workload.tokens} tokens, {workload.generated} generated")
    for variant, taken in times.items():
        numbers: dict[tuple[str, str], float] = {}
        for clock in Seconds._fields:
            values, base = ([getattr(one, clock) for one in all_of] for all_of in (taken, times[BASE]))
            middle, low, high = ratio(values, base)
            numbers |= {(f"{clock}_median", "ms"): 1e3 * median(values), (f"{clock}_min", "ms"): 1e3 * min(values)}
            numbers |= {(f"{clock}_ratio", "1"): middle, (f"{clock}_p20", "1"): low, (f"{clock}_p80", "1"): high}
            print(f"  {variant:12} {clock:9} {1e3 * median(values):8.1f} ms   {middle:.3f} ({low:.3f}–{high:.3f})")
        for (metric, unit), value in numbers.items():
            yield Row(name, *size, variant, metric, significant(value), unit, rounds, *origin)


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True, help="CSV file to write")
    found.add_argument("--model", help="hub id or folder; the embedded SmolLM2-135M-Instruct without it")
    found.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds per workload")
    found.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    found.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return found


if __name__ == "__main__":
    main()
