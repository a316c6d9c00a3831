"""Times one training step of every variant on a GPU: layers of Llama-2-7B and Llama-3-8B, and a whole Llama-2-7B.

python -m benchmarks.gpu_step --out benchmarks/results/step_gpu.csv

Weights are random bfloat16, norm scales float32; attention is PyTorch's fused one. Times are the host's, from a
synchronized device to a synchronized device, so that what it takes to launch a step is in them; `launches` counts
kernels and copies of one step and `device_time` adds up how long they ran. `peak_memory` is all that was allocated at
most, weights included, and `step_memory` what the step added to it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
import transformers
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.table import commit, device_name, significant, triton_version, writing
from benchmarks.workloads import (
    LLAMA2_7B_LAYERS,
    LLAMA3_8B_LAYERS,
    PLAIN,
    TINY,
    VARIANTS,
    Attached,
    Workload,
    batch,
    build,
    step,
)

ROUNDS = 10
GRAPH = "exact_graph"
"""The closed form once more, its step captured as a CUDA graph and replayed."""
PROBED = ("loop_n1", "loop_n4", "hutchinson_n1", "hutchinson_n4", "jvp_n1")
TIMED = (PLAIN, "step_ratio", *PROBED, "exact", "exact_quarter")
FULL_TIMED = (PLAIN, "step_ratio", "loop_n1", "hutchinson_n1", "exact", "exact_quarter")

LAYERS = tuple(
    model.reshaped(model.name, num_hidden_layers=4).of(1, tokens)
    for model in (LLAMA2_7B_LAYERS, LLAMA3_8B_LAYERS)
    for tokens in (512, 2048, 8192)
)
FULL = LLAMA2_7B_LAYERS.reshaped("llama2_7b", num_hidden_layers=32, vocab_size=32000).of(4, 512)
WORKLOADS = {
    "cuda": {**dict.fromkeys(LAYERS, TIMED), FULL: FULL_TIMED},
    "cpu": {TINY: (PLAIN, "step_ratio", "exact")},
}


_ACTIVITIES = {"cuda": [ProfilerActivity.CPU, ProfilerActivity.CUDA], "cpu": [ProfilerActivity.CPU]}


@dataclass(frozen=True)
class Row:
    """One number of the table; `ratio` metrics are relative to plain norm tuning in the same round."""

    benchmark: str
    variant: str
    sequences: int
    tokens: int
    metric: str
    value: float
    unit: str
    device: str
    torch: str
    triton: str
    transformers: str
    commit: str


@dataclass(frozen=True)
class Timed:
    """One step: milliseconds, and bytes allocated at most and before it (0 on a CPU)."""

    milliseconds: float
    peak: int
    before: int


def timed(workload: Workload, model: nn.Module, variant: str) -> Timed:
    """One step of a loop of steps: a step before it fills the allocator, and the scales move in between."""
    ids, attached = _given(workload, model), VARIANTS[variant](model, 0)
    device = ids.device
    try:
        step(model, ids, attached)
        _move_scales(model)
        before = _start_of_step(device)
        started = time.perf_counter()
        step(model, ids, attached)
        _finish(device)
        elapsed = 1e3 * (time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return Timed(elapsed, peak, before)
    finally:
        _close(model, attached)


def launched(workload: Workload, model: nn.Module, variant: str) -> tuple[int, float]:
    """How many kernels and copies one step runs on the device, and for how many milliseconds in all."""
    ids, attached = _given(workload, model), VARIANTS[variant](model, 0)
    try:
        step(model, ids, attached)
        _move_scales(model)
        _finish(ids.device)
        with profile(activities=_ACTIVITIES[ids.device.type]) as profiler:
            step(model, ids, attached)
            _finish(ids.device)
    finally:
        _close(model, attached)
    ran = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return len(ran), sum(event.time_range.elapsed_us() for event in ran) / 1e3


def replayed(workload: Workload, model: nn.Module, rounds: int) -> tuple[list[float], float]:
    """Milliseconds of every replay of a captured step with the closed form, and how far its gradients are from eager.

    The distance is ‖replayed − eager‖ / ‖eager‖ over all scales together, at scales that have moved since the capture.
    """
    ids, attached = _given(workload, model), VARIANTS["exact"](model, 0)
    try:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                step(model, ids, attached)
        torch.cuda.current_stream().wait_stream(aside)
        model.zero_grad(set_to_none=True)
        # The constants of scales that have not moved would be taken from the step before, and not be in the graph.
        _move_scales(model)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(model, ids, attached)
        captured = [parameter.grad for parameter in _scales(model)]
        _move_scales(model, 1 + 1e-2)
        times = [_replay(graph) for _ in range(rounds)]
        actual = torch.cat([gradient.flatten() for gradient in captured])
        step(model, ids, attached)
        expected = torch.cat([parameter.grad.flatten() for parameter in _scales(model)])
        return times, float((actual - expected).norm() / expected.norm())
    finally:
        _close(model, attached)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all workloads and write the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workloads = {workload.label: workload for workload in WORKLOADS[device.type]}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds per workload")
    parser.add_argument("--only", choices=list(workloads), help="one workload instead of all")
    options = parser.parse_args(arguments)
    with writing(options.out, Row) as write:
        for label, workload in workloads.items():
            if options.only in (None, label):
                write(_measure(workload, device, WORKLOADS[device.type][workload], options.rounds))


def _measure(workload: Workload, device: torch.device, variants: Sequence[str], rounds: int) -> Iterator[Row]:
    model, row = build(workload, device, torch.bfloat16), _row_maker(workload, device)
    measured = _interleaved(workload, model, variants, rounds)
    plain = [one.milliseconds for one in measured[PLAIN]]
    print(workload.label)
    for variant, steps in measured.items():
        yield from _time_rows(row, variant, [one.milliseconds for one in steps], plain)
        if device.type == "cuda":
            yield row(variant, "peak_memory", max(one.peak for one in steps), "B")
            yield row(variant, "step_memory", max(one.peak - one.before for one in steps), "B")
        launches, busy = launched(workload, model, variant)
        yield row(variant, "launches", launches, "1")
        yield row(variant, "device_time", busy, "ms")
    if device.type == "cuda":
        yield from _graph_rows(row, workload, model, rounds, plain)


def _interleaved(workload: Workload, model: nn.Module, variants: Sequence[str], rounds: int) -> dict[str, list[Timed]]:
    """Every variant once per round, behind one that compiles its kernels; who runs out of memory is left out."""
    able = []
    for variant in variants:
        try:
            timed(workload, model, variant)
            able.append(variant)
        except torch.OutOfMemoryError as failure:
            print(f"{workload.label} {variant} failed: {str(failure)[:200]}", file=sys.stderr)
    measured: dict[str, list[Timed]] = {variant: [] for variant in able}
    for _ in range(rounds):
        for variant, steps in measured.items():
            steps.append(timed(workload, model, variant))
    return measured


def _graph_rows(
    row: Callable[[str, str, float, str], Row],
    workload: Workload,
    model: nn.Module,
    rounds: int,
    plain: Sequence[float],
) -> Iterator[Row]:
    try:
        times, error = replayed(workload, model, rounds)
    except RuntimeError as failure:
        # A step that cannot be captured must not take the rest of the table with it.
        print(f"{workload.label} {GRAPH} failed: {str(failure)[:500]}", file=sys.stderr)
        return
    yield from _time_rows(row, GRAPH, times, plain)
    yield row(GRAPH, "gradient_error", error, "1")


def _time_rows(
    row: Callable[[str, str, float, str], Row], variant: str, times: Sequence[float], plain: Sequence[float]
) -> Iterator[Row]:
    low, *_, high = quantiles(times, n=5, method="inclusive") if len(times) > 1 else [*times, *times]
    ratio = median(value / base for value, base in zip(times, plain, strict=True))
    print(f"  {variant:20} {median(times):9.2f} ms {ratio:7.3f}")
    yield row(variant, "time_median", median(times), "ms")
    yield row(variant, "time_p20", low, "ms")
    yield row(variant, "time_p80", high, "ms")
    yield row(variant, "time_ratio", ratio, "1")


def _given(workload: Workload, model: nn.Module) -> Tensor:
    return batch(workload, next(model.parameters()).device)


def _scales(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _move_scales(model: nn.Module, factor: float = 1 + 1e-6) -> None:
    """As an optimizer would, so that what depends on them has to be computed again."""
    with torch.no_grad():
        for scale in _scales(model):
            scale.mul_(factor)


def _start_of_step(device: torch.device) -> int:
    _finish(device)
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def _close(model: nn.Module, attached: Attached | None) -> None:
    model.zero_grad(set_to_none=True)
    if attached is not None:
        attached.close()


def _row_maker(workload: Workload, device: torch.device) -> Callable[[str, str, float, str], Row]:
    origin = device_name(device), torch.__version__, triton_version(), transformers.__version__, commit()

    def row(variant: str, metric: str, value: float, unit: str) -> Row:
        size = workload.sequences, workload.tokens
        return Row(workload.name, variant, *size, metric, significant(value), unit, *origin)

    return row


if __name__ == "__main__":
    main()
