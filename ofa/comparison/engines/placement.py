"""Assign GPUs and threads to the workers of this machine."""

from __future__ import annotations

import os

from ofa.comparison.engines import Placement
from ofa.errors import InputError
from ofa.threads import threads_from_environment, usable_cores


def placements(
    workers: int | None,
    device: str,
    *,
    device_map: str | None,
    gpus: tuple[str, ...],
    cores: int,
    workers_per_gpu: int = 1,
) -> tuple[Placement, ...]:
    """The placements of `workers` workers; by default `workers_per_gpu` for each GPU, or one on a CPU.

    Workers are spread evenly over the GPUs; with a `device_map` each gets an equal number of GPUs. The machine's cores
    are divided among the workers. `gpus` are names as in CUDA_VISIBLE_DEVICES.

    Raises:
        InputError: there are more workers than slots on GPUs, or there is no GPU to share.
    """
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers} would run nothing: give at least 1")
    on_gpus = _chosen(device, gpus)
    check_sharing(workers_per_gpu, len(on_gpus), device_map)
    if not on_gpus:
        # An empty value hides all GPUs, so that no library initializes one.
        hidden = "" if device == "cpu" else None
        return (Placement(device, _threads(workers or 1, cores), hidden),) * (workers or 1)
    places = len(on_gpus) * workers_per_gpu
    count = workers or (1 if device_map is not None else places)
    if count > places:
        raise InputError(
            f"--workers is {count}, but there is a GPU for only {places} of them: lower --workers, "
            f"{way_out(count, len(on_gpus), device_map)}or choose --device cpu"
        )
    threads = _threads(count, cores)
    return tuple(
        Placement("cuda", threads, visible, sharing) for visible, sharing in _dealt(on_gpus, count, device_map)
    )


def check_sharing(workers_per_gpu: int, gpus: int, device_map: str | None) -> None:
    """Check that there are GPUs to share if `workers_per_gpu` is above 1.

    Raises:
        InputError: there are none, or a `device_map` gives each worker several.
    """
    if workers_per_gpu == 1:
        return
    if device_map is not None:
        raise InputError(
            "--workers-per-gpu puts several workers on a GPU, and --device-map a worker on several: leave one of them "
            "out"
        )
    if not gpus:
        raise InputError(
            f"--workers-per-gpu {workers_per_gpu} has no effect without a CUDA GPU: leave it out, and pass "
            "--workers for several cells at once"
        )


def way_out(workers: int, gpus: int, device_map: str | None) -> str:
    """How to run that many workers on these GPUs, as part of a sentence; empty with a `device_map`."""
    return "" if device_map is not None else f"let them share with --workers-per-gpu {-(-workers // gpus)}, "


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, named as in CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(named[:count] if named else map(str, range(count)))


def available_cores() -> int:
    """The cores for all workers: OMP_NUM_THREADS if it is set, else the idle cores."""
    return threads_from_environment() or usable_cores().free


def _chosen(device: str, gpus: tuple[str, ...]) -> tuple[str, ...]:
    """The GPUs that a device option selects; none for other devices."""
    if device in ("auto", "cuda"):
        return gpus
    kind, _, index = device.partition(":")
    return gpus[int(index) : int(index) + 1] if kind == "cuda" and index.isdigit() else ()


def _dealt(gpus: tuple[str, ...], count: int, device_map: str | None) -> list[tuple[str, int]]:
    """The visible GPUs of each worker, and how many workers share them."""
    if device_map is not None:
        share = len(gpus) // count
        return [(",".join(gpus[index * share : (index + 1) * share]), 1) for index in range(count)]
    # Round-robin: with fewer cells than slots, workers do not share a GPU needlessly.
    names = [gpus[index % len(gpus)] for index in range(count)]
    return [(name, names.count(name)) for name in names]


def _threads(workers: int, cores: int) -> int:
    return max(1, cores // workers)
