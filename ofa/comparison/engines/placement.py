"""Which GPU and how many threads each worker of this machine gets."""

from __future__ import annotations

import os

from ofa.comparison.engines import Placement
from ofa.errors import InputError


def placements(
    workers: int | None, device: str, *, device_map: str | None, gpus: tuple[str, ...], cores: int
) -> tuple[Placement, ...]:
    """The places of `workers` workers, or of one for each GPU (one on a CPU) where it is None.

    A worker has a GPU of its own; with a `device_map` the GPUs are dealt out evenly, several to each. The cores of the
    machine are divided among the workers. `gpus` are names as CUDA_VISIBLE_DEVICES has them.

    Raises:
        InputError: there are fewer GPUs than workers, or a single GPU was named for several workers.
    """
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers} would run nothing: give at least 1")
    on_gpus = _chosen(device, gpus)
    if not on_gpus:
        # An empty list hides every GPU, so that nobody opens one by accident.
        hidden = "" if device == "cpu" else None
        return _divided(workers or 1, device, [hidden] * (workers or 1), cores)
    count = workers or (1 if device_map is not None else len(on_gpus))
    if count > len(on_gpus):
        raise InputError(
            f"{count} workers were asked for and there is a GPU for {len(on_gpus)} of them: lower --workers, or "
            "choose --device cpu"
        )
    share = len(on_gpus) // count if device_map is not None else 1
    visible = [",".join(on_gpus[index * share : (index + 1) * share]) for index in range(count)]
    return _divided(count, "cuda", visible, cores)


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(named[:count] if named else map(str, range(count)))


def available_cores() -> int:
    """The cores that this process may use: OMP_NUM_THREADS where it is set, as for any other program."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdigit() and int(chosen) > 0:
        return int(chosen)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _chosen(device: str, gpus: tuple[str, ...]) -> tuple[str, ...]:
    """The GPUs that a device option leaves to the workers; none where it asks for something else."""
    if device in ("auto", "cuda"):
        return gpus
    kind, _, index = device.partition(":")
    return gpus[int(index) : int(index) + 1] if kind == "cuda" and index.isdigit() else ()


def _divided(workers: int, device: str, visible: list[str | None] | list[str], cores: int) -> tuple[Placement, ...]:
    threads = max(1, cores // workers)
    return tuple(Placement(device, threads, gpus) for gpus in visible)
