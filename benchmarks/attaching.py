"""The cost of regularizers with a term or both off, of attaching, and the memory of each estimator.

python -m benchmarks.attaching --out benchmarks/results/attaching_cpu.csv

- `overhead`: time of a training step with both terms off, and with the step ratio alone, relative to a plain step of
  the same round; and how many hooks the model has. A second plain variant shows the machine's noise.
- `attach`: milliseconds to attach and to close, after a first time that imports modules; and how much longer the first
  measured pass takes than the second: constants of the closed form, epsilon scales of finite differences.
- `memory`: bytes that autograd holds when a forward pass ends, each storage once, without parameters; and the peak of
  the memory allocated during a step. Both are counted, not sampled; the first is the same in every run, the second
  depends on when Python's garbage collector runs. Under activation checkpointing, autograd does not know what
  checkpoints hold, so only the peak is stated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import ofa
from benchmarks.table import commit, cpu, significant, writing
from benchmarks.workloads import PLAIN, SMOLLM2_135M, Attach, Workload, batch, build, loss, regularized, step
from ofa.models.load import load_model

ROUNDS = 20
EMBEDDED = "embedded"
LLAMA_32 = SMOLLM2_135M.reshaped("llama_32_layers", num_hidden_layers=32)
"""A 32-layer model of the embedded one's width."""

OVERHEAD: dict[str, Attach] = {
    PLAIN: lambda model, seed: None,
    "plain_again": lambda model, seed: None,
    "both_off": regularized("auto", step_ratio=0.0, sharpness=0.0),
    "step_ratio": regularized("auto", sharpness=0.0),
}
ATTACHED: dict[str, Attach] = {
    "step_ratio": regularized("auto", sharpness=0.0),
    "exact": regularized("exact"),
    "hutchinson": regularized("hutchinson"),
}
MEASURED: dict[str, Attach] = {
    PLAIN: lambda model, seed: None,
    "step_ratio": regularized("auto", sharpness=0.0),
    "exact": regularized("exact"),
    "hutchinson_n1": regularized("hutchinson"),
    "hutchinson_n4": regularized("hutchinson", samples=4),
}


@dataclass(frozen=True)
class Row:
    """One number; times are relative to plain in the same round, bytes to plain."""

    part: str
    model: str
    variant: str
    sequences: int
    tokens: int
    checkpointing: bool
    metric: str
    value: float
    unit: str
    rounds: int
    device: str
    torch: str
    transformers: str
    commit: str


Number = tuple[str, str, float, str]
"""Variant, metric, value and unit."""


def overhead(model: nn.Module, ids: Tensor, rounds: int) -> Iterator[Number]:
    """Step times in interleaved rounds, each of which begins with another variant."""
    names = list(OVERHEAD)
    wall: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    hooks = dict.fromkeys(names, 0)
    step(model, ids, None)
    for index in range(rounds):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            attached = OVERHEAD[name](model, 0)
            hooks[name] = count_hooks(model)
            step(model, ids, attached)  # fills the allocator
            began = time.perf_counter(), time.process_time()
            step(model, ids, attached)
            _wait(ids)
            wall[name].append(time.perf_counter() - began[0])
            processor[name].append(time.process_time() - began[1])
            if attached is not None:
                attached.close()
    for name in names:
        yield name, "hooks", hooks[name] - hooks[PLAIN], "1"
        yield name, "wall_median", 1e3 * median(wall[name]), "ms"
        for clock, times in (("wall", wall), ("processor", processor)):
            ratios = [own / plain for own, plain in zip(times[name], times[PLAIN], strict=True)]
            for statistic, value in _percentiles(ratios):
                yield name, f"{clock}_ratio_{statistic}", value, "1"


def count_hooks(model: nn.Module) -> int:
    """Number of forward and backward hooks of a model's modules."""
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


def attaching(model: nn.Module, rounds: int) -> Iterator[Number]:
    """Times to attach and close each estimator, and the extra time of the first measured pass."""
    few = torch.arange(3, 7, device=next(model.parameters()).device).unsqueeze(0)
    for name, attach in ATTACHED.items():
        attach(model, 0).close()  # type: ignore[union-attr]
        both, first = [], []
        for _ in range(rounds):
            began = time.perf_counter()
            attached: Any = attach(model, 0)
            middle = time.perf_counter()
            with torch.no_grad(), attached.measuring():
                passes = [_seconds(lambda: model(input_ids=few), few) for _ in range(3)]
            last = time.perf_counter()
            attached.close()
            both.append(1e3 * (time.perf_counter() - last + middle - began))
            first.append(1e3 * (passes[0] - min(passes[1:])))
        for statistic, value in _percentiles(both):
            yield name, f"attach_and_close_{statistic}", value, "ms"
        yield name, "first_pass_more_median", median(first), "ms"


def memory(model: nn.Module, ids: Tensor, names: Sequence[str], *, checkpointing: bool) -> Iterator[Number]:
    """Saved and peak bytes of the variants, the first of which is plain."""
    plain: dict[str, int] = {}
    for name in names:
        attached = MEASURED[name](model, 0)
        step(model, ids, attached)  # constants of the closed form are computed once and cached
        counted = {"peak_bytes": peak_bytes(lambda: step(model, ids, attached), ids)}  # noqa: B023
        if not checkpointing:
            counted["saved_bytes"] = saved_bytes(model, ids, attached)
        model.zero_grad(set_to_none=True)
        if attached is not None:
            attached.close()
        plain = plain or counted
        for metric, value in counted.items():
            yield name, metric, value, "B"
            yield name, metric.replace("bytes", "ratio"), value / plain[metric], "1"


def saved_bytes(model: nn.Module, ids: Tensor, attached: Any) -> int:
    """Bytes of the storages that autograd holds after a forward pass, without those of parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {0: 0}

    class Held:
        """Replaces a saved tensor in the graph, for as long as the graph keeps it."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            storage = tensor.untyped_storage()
            self.key = storage.data_ptr()
            held[self.key] = storage.nbytes()
            alive[self.key] = alive.get(self.key, 0) + 1

        def __del__(self) -> None:
            alive[self.key] -= 1

    alive: dict[int, int] = {}
    with saved_tensors_hooks(Held, lambda found: found.tensor):
        value = loss(model, ids, attached)
    total = sum(held[key] for key, count in alive.items() if count and key not in own)
    del value
    return total


def peak_bytes(call: Callable[[], None], ids: Tensor) -> int:
    """Peak of the memory allocated during a call, minus that before."""
    if ids.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the selected parts and write the table."""
    options = _parser().parse_args(arguments)
    device = cpu() if options.device == "cpu" else torch.cuda.get_device_name()
    origin = options.rounds, device, torch.__version__, transformers.__version__, commit()
    with writing(options.out, Row) as write:
        for part, model, workload, checkpointing, numbers in _parts(options):
            size = workload.sequences, workload.tokens
            label = f"{part} {model} {workload.sequences}x{workload.tokens}{' checkpointing' * checkpointing}"
            for variant, metric, value, unit in numbers:
                print(f"{label} {variant:14} {metric:30} {significant(value)} {unit}", flush=True)
                write([Row(part, model, variant, *size, checkpointing, metric, significant(value), unit, *origin)])


def _parts(options: argparse.Namespace) -> Iterator[tuple[str, str, Workload, bool, Iterator[Number]]]:
    small = SMOLLM2_135M.of(options.sequences[0], options.tokens[0])
    model = _model(options)
    if "overhead" in options.parts:
        timed = small.of(options.sequences[-1], options.tokens[0])
        yield "overhead", options.model, timed, False, overhead(model, _ids(timed, options), options.rounds)
    if "attach" in options.parts:
        yield "attach", options.model, small, False, attaching(model, options.rounds)
        if options.model == EMBEDDED:
            deep = build(LLAMA_32).to(options.device)
            yield "attach", LLAMA_32.name, small, False, attaching(deep, options.rounds)
    if "memory" not in options.parts:
        return
    workloads = dict.fromkeys((small, small.of(options.sequences[-1], options.tokens[-1])))
    names = [PLAIN, *(name for name in options.variants if name != PLAIN)]
    for checkpointing in (False, True):
        if checkpointing:
            model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        for workload in workloads:
            numbers = memory(model, _ids(workload, options), names, checkpointing=checkpointing)
            yield "memory", options.model, workload, checkpointing, numbers


def _model(options: argparse.Namespace) -> nn.Module:
    offline = options.model == EMBEDDED
    loaded = load_model(None if offline else options.model, dtype="float32", device=options.device, offline=offline)
    model: nn.Module = loaded.model.eval()
    ofa.tune_norms(model)
    return model


def _ids(workload: Workload, options: argparse.Namespace) -> Tensor:
    return batch(workload).clamp_max(options.vocabulary - 1).to(options.device)


def _percentiles(values: Sequence[float]) -> Iterator[tuple[str, float]]:
    low, *_, high = quantiles(values, n=5, method="inclusive") if len(values) > 1 else [*values] * 2
    yield from (("median", median(values)), ("p20", low), ("p80", high))


def _seconds(call: Callable[[], Any], ids: Tensor) -> float:
    began = time.perf_counter()
    call()
    _wait(ids)
    return time.perf_counter() - began


def _wait(ids: Tensor) -> None:
    if ids.device.type == "cuda":
        torch.cuda.synchronize()


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True, help="CSV file to write")
    found.add_argument("--model", default=EMBEDDED, help="a model's folder or hub id, or embedded")
    found.add_argument("--parts", nargs="+", default=["overhead", "attach", "memory"], help="what to measure")
    found.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds")
    found.add_argument(
        "--variants", nargs="+", default=list(MEASURED), choices=list(MEASURED), help="of the memory part"
    )
    found.add_argument("--sequences", type=int, nargs="+", default=[4, 10], help="of the smaller and the larger batch")
    found.add_argument("--tokens", type=int, nargs="+", default=[48, 128], help="likewise, per sequence")
    found.add_argument("--vocabulary", type=int, default=49152, help="largest token id, plus one")
    found.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return found


if __name__ == "__main__":
    main()
