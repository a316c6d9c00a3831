"""Which GPU and how many threads each worker of this machine gets."""

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
    """The places of `workers` workers, or of `workers_per_gpu` for each GPU (one on a CPU) where it is None.

    A worker has a GPU of its own, or shares it with as few others as there must be; with a `device_map` the GPUs are
    dealt out evenly, several to each. The cores of the machine are divided among the workers. `gpus` are names as
    CUDA_VISIBLE_DEVICES has them.

    Raises:
        InputError: there are fewer places than workers, or a single GPU was named for several workers, or there is no
            GPU to share.
    """
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers} would run nothing: give at least 1")
    on_gpus = _chosen(device, gpus)
    check_sharing(workers_per_gpu, len(on_gpus), device_map)
    if not on_gpus:
        # An empty list hides every GPU, so that nobody opens one by accident.
        hidden = "" if device == "cpu" else None
        return (Placement(device, _threads(workers or 1, cores), hidden),) * (workers or 1)
    places = len(on_gpus) * workers_per_gpu
    count = workers or (1 if device_map is not None else places)
    if count > places:
        raise InputError(
            f"{count} workers were asked for and there is a GPU for {places} of them: lower --workers, "
            f"{way_out(count, len(on_gpus), device_map)}or choose --device cpu"
        )
    threads = _threads(count, cores)
    return tuple(
        Placement("cuda", threads, visible, sharing) for visible, sharing in _dealt(on_gpus, count, device_map)
    )


def check_sharing(workers_per_gpu: int, gpus: int, device_map: str | None) -> None:
    """See that there are GPUs to share where sharing was asked for.

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
            f"--workers-per-gpu {workers_per_gpu} means nothing without a CUDA GPU to share: leave it out, and pass "
            "--workers for several cells at once"
        )


def way_out(workers: int, gpus: int, device_map: str | None) -> str:
    """How so many workers could run on these GPUs all the same, as part of a sentence; empty with a `device_map`."""
    return "" if device_map is not None else f"let them share with --workers-per-gpu {-(-workers // gpus)}, "


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(named[:count] if named else map(str, range(count)))


def available_cores() -> int:
    """The cores for all workers: OMP_NUM_THREADS where it is set, else those that nothing else uses."""
    return threads_from_environment() or usable_cores().free


def _chosen(device: str, gpus: tuple[str, ...]) -> tuple[str, ...]:
    """The GPUs that a device option leaves to the workers; none where it asks for something else."""
    if device in ("auto", "cuda"):
        return gpus
    kind, _, index = device.partition(":")
    return gpus[int(index) : int(index) + 1] if kind == "cuda" and index.isdigit() else ()


def _dealt(gpus: tuple[str, ...], count: int, device_map: str | None) -> list[tuple[str, int]]:
    """The visible GPUs of each worker, and how many workers share them."""
    if device_map is not None:
        share = len(gpus) // count
        return [(",".join(gpus[index * share : (index + 1) * share]), 1) for index in range(count)]
    # In turns, so that workers have GPUs of their own where fewer cells are left than there are places.
    names = [gpus[index % len(gpus)] for index in range(count)]
    return [(name, names.count(name)) for name in names]


def _threads(workers: int, cores: int) -> int:
    return max(1, cores // workers)
