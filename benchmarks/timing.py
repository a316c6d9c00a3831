"""Device time of a call without launch overhead, and the copy bandwidth of a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

Call = Callable[[], Any]

CACHES_FILLED = 3
"""Data of consecutive calls, in multiples of the last-level cache."""
COPIED = {"cuda": 2**30, "cpu": 2**26}
"""Bytes of the tensor whose copy is timed."""


@dataclass(frozen=True)
class Times:
    """Percentiles of the repeats, in milliseconds."""

    p20: float
    median: float
    p80: float


def measure(calls: Sequence[Call], device: torch.device, repeats: int) -> Times:
    """Times of single calls, cycling through `calls` after each has run once.

    A call's results are kept until its next turn, so that neither they nor its inputs are in the cache.
    """
    results = [call() for call in calls]
    once = _device_times if device.type == "cuda" else _host_times
    times = once(calls, results, repeats)
    low, *_, high = quantiles(times, n=5, method="inclusive")
    return Times(low, median(times), high)


def sets_beyond_cache(nbytes: int, device: torch.device) -> int:
    """Number of calls of `nbytes` each to cycle through so that nothing is in the cache; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    return max(1, -(-CACHES_FILLED * torch.cuda.get_device_properties(device).L2_cache_size // nbytes))


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes per second, read and written, of a copy far larger than any cache."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = measure([lambda: target.copy_(source)], device, repeats)
    return 2 * source.nbytes / (1e-3 * times.median)


def free_memory(device: torch.device) -> int:
    """Bytes available to tensors, after releasing the allocator's cache."""
    if device.type != "cuda":
        return 2**33
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _device_times(calls: Sequence[Call], results: list[Any], repeats: int) -> list[float]:
    head_start = _cycles(2 * _host_seconds(calls[0]))
    events = []
    for index in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # While the device sleeps, the host enqueues the whole call, so that its kernels run without gaps.
        torch.cuda._sleep(head_start)
        start.record()
        results[index % len(calls)] = calls[index % len(calls)]()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _host_times(calls: Sequence[Call], results: list[Any], repeats: int) -> list[float]:
    times = []
    for index in range(repeats):
        started = time.perf_counter()
        results[index % len(calls)] = calls[index % len(calls)]()
        times.append(1e3 * (time.perf_counter() - started))
    return times


def _host_seconds(call: Call) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _cycles(seconds: float) -> int:
    kilohertz = torch.cuda.get_device_properties(torch.cuda.current_device()).clock_rate
    return int(1e3 * kilohertz * seconds)
