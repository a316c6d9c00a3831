"""Times one training step of every variant, in interleaved rounds, and writes times, peak memory and counts.

python -m benchmarks.step --out benchmarks/results/step_cpu.csv
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import nan
from pathlib import Path
from statistics import median, quantiles

import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import cost
from benchmarks.table import commit, cpu, significant, writing
from benchmarks.workloads import (
    PLAIN,
    SMOLLM2_135M,
    VARIANTS,
    Workload,
    batch,
    build,
    move_scales,
    step,
    steps_of,
)

ROUNDS = 5
WHAT = ("counts", "peak", "times")


@dataclass(frozen=True)
class Row:
    """One number of the table; `ratio` metrics are relative to plain norm tuning in the same run."""

    benchmark: str
    variant: str
    sequences: int
    tokens: int
    metric: str
    value: float
    unit: str
    device: str
    torch: str
    transformers: str
    commit: str


@dataclass(frozen=True)
class Times:
    """One step of a variant, in milliseconds: wall clock, and CPU time of the thread that computes."""

    wall: float
    cpu: float


def milliseconds(workload: Workload, model: nn.Module, variant: str) -> Times:
    """Times of one step in a loop of steps, without attaching and detaching; the mean of those of a round.

    A step before them fills the allocator, and the scales are moved in between, as an optimizer moves them.
    """
    ids, attached, rounds = batch(workload), VARIANTS[variant](model, 0), steps_of(variant)
    try:
        for _ in range(rounds):
            step(model, ids, attached)
            move_scales(model)
        started, spent = time.perf_counter(), time.thread_time()
        for _ in range(rounds):
            step(model, ids, attached)
            move_scales(model)
        wall, spent = time.perf_counter() - started, time.thread_time() - spent
        return Times(1e3 * wall / rounds, 1e3 * spent / rounds)
    finally:
        if attached is not None:
            attached.close()


def interleaved(workload: Workload, model: nn.Module, rounds: int, variants: Sequence[str]) -> dict[str, list[Times]]:
    """Times of every variant in every round, after a plain step that warms up and does not count.

    Each round takes one step of every variant, so that a machine that slows down slows all of them.
    """
    milliseconds(workload, model, PLAIN)
    times: dict[str, list[Times]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, values in times.items():
            values.append(milliseconds(workload, model, variant))
    return times


def peak_bytes(workload: Workload, model: nn.Module, variant: str) -> int:
    """The most bytes that are allocated at a time in one training step, without those before it."""
    ids, attached = batch(workload), VARIANTS[variant](model, 0)
    try:
        step(model, ids, attached)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step(model, ids, attached)
    finally:
        if attached is not None:
            attached.close()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(changes))


def table(costs: dict[str, cost.Cost], times: dict[str, Sequence[Times]], plain: dict[str, Sequence[Times]]) -> str:
    """Wall-clock time; both times, FLOPs and saved bytes relative to plain, whose steps each variant has beside it."""
    lines = [f"{'variant':20} {'ms':>9} {'wall':>7} {'CPU':>7} {'FLOPs':>7} {'saved':>7}"]
    for variant, values in times.items():
        wall, spent = time_ratio(values, plain[variant]), cpu_ratio(values, plain[variant])
        flops = saved = nan
        if costs:
            flops = costs[variant].flops / costs[PLAIN].flops
            saved = costs[variant].saved_bytes / costs[PLAIN].saved_bytes
        shown = median(value.wall for value in values)
        lines.append(f"{variant:20} {shown:9.1f} {wall:7.3f} {spent:7.3f} {flops:7.3f} {saved:7.3f}")
    return "\n".join(lines)


def time_ratio(values: Sequence[Times], plain: Sequence[Times]) -> float:
    """Median over the rounds of wall-clock time over that of a plain step in the same round."""
    return median(value.wall / base.wall for value, base in zip(values, plain, strict=True))


def cpu_ratio(values: Sequence[Times], plain: Sequence[Times]) -> float:
    """The same of the thread's CPU time, which other processes disturb less."""
    return median(value.cpu / base.cpu for value, base in zip(values, plain, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all workloads and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds per workload")
    labels = [workload.label for workload in cost.WORKLOADS]
    parser.add_argument("--only", choices=labels, help="one workload instead of all")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="plain and others"
    )
    parser.add_argument("--layers", type=int, help="layers of the model, with a vocabulary in proportion")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT, help="each takes minutes")
    options = parser.parse_args(arguments)
    with writing(options.out, Row) as write:
        for workload in cost.WORKLOADS:
            if options.only in (None, workload.label):
                shown = workload if options.layers is None else workload.shortened(options.layers)
                write(_measure(shown, options.rounds, options.what, options.variants))


def _measure(workload: Workload, rounds: int, what: Sequence[str], variants: Sequence[str]) -> Iterator[Row]:
    model = build(workload)
    row = _row_maker(workload)
    costs: dict[str, cost.Cost] = {}
    if "counts" in what:
        costs = {variant: cost.count(workload, model, variant) for variant in variants}
        yield from _cost_rows(costs, row)
    if not workload.name.startswith(SMOLLM2_135M.name):
        # Single-precision arithmetic of a 7B shape on a CPU says nothing about where it is used.
        return
    if "peak" in what:
        peaks = {variant: peak_bytes(workload, model, variant) for variant in variants}
        for variant, peak in peaks.items():
            yield row(variant, "peak_bytes", peak, "B")
            yield row(variant, "peak_bytes_ratio", peak / peaks[PLAIN], "1")
    if "times" not in what:
        return
    times = interleaved(workload, model, rounds, variants)
    print(workload.label, table(costs, times, dict.fromkeys(times, times[PLAIN])), sep="\n")
    for variant, measured in times.items():
        values = [one.wall for one in measured]
        low, *_, high = quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 2
        yield row(variant, "time_median", median(values), "ms")
        yield row(variant, "time_p20", low, "ms")
        yield row(variant, "time_p80", high, "ms")
        yield row(variant, "time_ratio", time_ratio(measured, times[PLAIN]), "1")
        yield row(variant, "cpu_time_ratio", cpu_ratio(measured, times[PLAIN]), "1")


def _cost_rows(costs: dict[str, cost.Cost], row: Callable[[str, str, float, str], Row]) -> Iterator[Row]:
    plain = costs[PLAIN]
    for variant, counted in costs.items():
        yield row(variant, "flops", counted.flops, "FLOP")
        yield row(variant, "flops_ratio", counted.flops / plain.flops, "1")
        yield row(variant, "saved_bytes", counted.saved_bytes, "B")
        yield row(variant, "saved_bytes_ratio", counted.saved_bytes / plain.saved_bytes, "1")


def _row_maker(workload: Workload) -> Callable[[str, str, float, str], Row]:
    origin = cpu(), torch.__version__, transformers.__version__, commit()

    def row(variant: str, metric: str, value: float, unit: str) -> Row:
        size = workload.sequences, workload.tokens
        return Row(workload.name, variant, *size, metric, significant(value), unit, *origin)

    return row


if __name__ == "__main__":
    main()
