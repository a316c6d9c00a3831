"""Kernels of a training step on a GPU, their number and times, by PyTorch's profiler.

python -m benchmarks.gpu_profile --out benchmarks/results/step_profile_gpu.csv

The steps of `benchmarks.gpu_step`, in a separate process: the profiler keeps slowing launches down after it was used.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_step import LAYERS, close, finish, given, move_scales
from benchmarks.table import commit, device_name, significant, triton_version, writing
from benchmarks.workloads import PLAIN, TINY, VARIANTS, Workload, build, step

WORKLOADS = {"cuda": LAYERS[:2], "cpu": (TINY,)}
PROFILED = (PLAIN, "step_ratio", "hutchinson_n1", "exact", "exact_every4")
_ACTIVITIES = {"cuda": [ProfilerActivity.CPU, ProfilerActivity.CUDA], "cpu": [ProfilerActivity.CPU]}
_COUNTED = {"cuda": DeviceType.CUDA, "cpu": DeviceType.CPU}
"""Events of the device; on a CPU, to check that this runs, of the host."""


@dataclass(frozen=True)
class Row:
    """One number of one kernel or copy in one step."""

    benchmark: str
    variant: str
    sequences: int
    tokens: int
    kernel: str
    metric: str
    value: float
    unit: str
    device: str
    torch: str
    triton: str
    transformers: str
    commit: str


def kernels(workload: Workload, model: nn.Module, variant: str) -> dict[str, list[float]]:
    """Microseconds of every launch of one step by kernel name, sorted by total time."""
    ids, attached = given(workload, model), VARIANTS[variant](model, 0)
    try:
        for _ in range(2):
            step(model, ids, attached)
            move_scales(model)
        finish(ids.device)
        with profile(activities=_ACTIVITIES[ids.device.type]) as profiler:
            step(model, ids, attached)
            finish(ids.device)
    finally:
        close(model, attached)
    found = defaultdict(list)
    for event in profiler.events():
        if event.device_type == _COUNTED[ids.device.type]:
            found[event.name].append(event.time_range.elapsed_us())
    return dict(sorted(found.items(), key=lambda one: -sum(one[1])))


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile all workloads and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with writing(options.out, Row) as write:
        for workload in WORKLOADS[device.type]:
            write(_profiled(workload, device))


def _profiled(workload: Workload, device: torch.device) -> Iterator[Row]:
    model = build(workload, device, torch.bfloat16)
    origin = device_name(device), torch.__version__, triton_version(), transformers.__version__, commit()
    size = workload.sequences, workload.tokens
    for variant in PROFILED:
        found = kernels(workload, model, variant)
        launches, busy = sum(map(len, found.values())), sum(map(sum, found.values()))
        print(f"{workload.label} {variant:14} {launches:5} launches {1e-3 * busy:9.2f} ms", flush=True)
        for name, times in found.items():
            yield Row(workload.name, variant, *size, name, "launches", len(times), "1", *origin)
            yield Row(workload.name, variant, *size, name, "device_time", significant(sum(times)), "us", *origin)


if __name__ == "__main__":
    main()
