"""CPU overhead of a training step that runs on kernels: milliseconds and launches, without a GPU.

python -m benchmarks.host_time --out benchmarks/results/host_time_cpu.csv

Four small layers, so that arithmetic is negligible. The operations are those of a GPU, but the launch function only
counts; results are meaningless. A launch itself, on a GPU some ten microseconds, is not in the time. Each round has a
step of every variant, and `ratio` is relative to the plain step of the same round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers

from benchmarks.gpu_step import close, move_scales
from benchmarks.table import commit, cpu, significant, triton_version, writing
from benchmarks.workloads import PLAIN, TINY, VARIANTS, batch, build, step
from ofa_kernels import dispatch
from ofa_kernels.ops.launching import launching_by

WORKLOAD = TINY.reshaped("tiny_4_layers", num_hidden_layers=4).of(1, 8)
TIMED = (PLAIN, "step_ratio", "hutchinson_n1", "exact", "exact_every4")
WARM_UP = 5


@dataclass(frozen=True)
class Row:
    """One number of one variant; `launches` are those of the project's own kernels."""

    benchmark: str
    variant: str
    layers: int
    metric: str
    value: float
    unit: str
    device: str
    torch: str
    triton: str
    transformers: str
    commit: str


@dataclass(frozen=True)
class Measured:
    """Milliseconds of every round, and the launches of the project's kernels in a step."""

    milliseconds: list[float]
    launches: int


def measure(rounds: int) -> dict[str, Measured]:
    """A step of every variant in each round, each on its own model; by variant."""
    # Attach before the kernels stop computing, since steps are recognized by a trial run.
    models = {variant: build(WORKLOAD, dtype=torch.bfloat16) for variant in TIMED}
    attached = {variant: VARIANTS[variant](model, 0) for variant, model in models.items()}
    ids, launches = batch(WORKLOAD), 0

    def count(*launch: Any) -> None:
        nonlocal launches
        launches += 1

    def milliseconds(variant: str) -> float:
        move_scales(models[variant])
        started = time.perf_counter()
        step(models[variant], ids, attached[variant])
        return 1e3 * (time.perf_counter() - started)

    found = {variant: Measured([], 0) for variant in TIMED}
    with kernels_everywhere(), launching_by(count, "sm_90"):
        for turn in range(WARM_UP + rounds):
            for variant in TIMED:
                before = launches
                elapsed = milliseconds(variant)
                if turn >= WARM_UP:
                    found[variant] = Measured([*found[variant].milliseconds, elapsed], launches - before)
    for variant, model in models.items():
        close(model, attached[variant])
    return found


@contextmanager
def kernels_everywhere() -> Iterator[None]:
    """Use the kernels on every device in this context."""
    own = dict(dispatch._IMPLEMENTATIONS)
    try:
        for operation, offered in own.items():
            dispatch._IMPLEMENTATIONS[operation] = tuple(replace(one, accepts=lambda tensor: True) for one in offered)
        yield
    finally:
        dispatch._IMPLEMENTATIONS.update(own)


def rows(found: dict[str, Measured]) -> Iterator[Row]:
    """The numbers of every variant, times as median and as 20th and 80th percentile."""
    origin = cpu(), torch.__version__, triton_version(), transformers.__version__, commit()
    layers = dict(WORKLOAD.shape)["num_hidden_layers"]

    def row(variant: str, metric: str, value: float, unit: str) -> Row:
        return Row(WORKLOAD.name, variant, layers, metric, significant(value), unit, *origin)

    for variant, measured in found.items():
        plain = found[PLAIN].milliseconds
        ratios = [one / other for one, other in zip(measured.milliseconds, plain, strict=True)]
        percentiles = quantiles(measured.milliseconds, n=5)
        yield row(variant, "time", median(measured.milliseconds), "ms")
        yield row(variant, "time_p20", percentiles[0], "ms")
        yield row(variant, "time_p80", percentiles[-1], "ms")
        yield row(variant, "ratio", median(ratios), "1")
        yield row(variant, "launches", measured.launches, "1")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = list(rows(measure(options.rounds)))
    with writing(options.out, Row) as write:
        write(found)
    for one in found:
        print(f"{one.variant:14} {one.metric:9} {one.value:10.4g} {one.unit}")


if __name__ == "__main__":
    main()
