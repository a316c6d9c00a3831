"""Where the cells of a comparison run: the options, and the GPUs and threads of each worker."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from ofa.errors import InputError
from ofa.threads import threads_from_environment, usable_cores


class Machines(BaseModel):
    """The workers, and their options for loading the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int | None = Field(None, ge=1)
    device: str = "auto"
    device_map: str | None = None
    batch_size: int = Field(16, ge=1)
    threads: int | None = Field(None, ge=1)
    offline: bool = False
    trust_remote_code: bool = False

    def placements(self) -> tuple[Placement, ...]:
        """The placement of each worker on this machine.

        Raises:
            InputError: there are too few GPUs, or a launcher started several processes.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                "ofa compare starts its workers itself: leave out `accelerate launch`, pass --workers for several "
                "cells at once, and --device-map auto for a model that needs several GPUs"
            )
        cores = available_cores()
        return placements(
            self.workers,
            self.device,
            self.threads,
            spread=self.device_map is not None,
            gpus=visible_gpus(),
            cores=cores,
        )


@dataclass(frozen=True)
class Placement:
    """The device and threads of one worker. `visible_gpus` sets CUDA_VISIBLE_DEVICES; None leaves it unchanged."""

    device: str
    threads: int
    visible_gpus: str | None = None


def placements(
    workers: int | None, device: str, threads: int | None, *, spread: bool, gpus: tuple[str, ...], cores: int
) -> tuple[Placement, ...]:
    """The placements of `workers` workers; by default one for each GPU, or one on a CPU.

    Each worker gets a GPU of its own, or if the model is `spread`, an equal number of them. Without `threads`, the
    machine's cores are divided among the workers. `gpus` are names as in CUDA_VISIBLE_DEVICES.

    Raises:
        InputError: there are more workers than GPUs.
    """
    on_gpus = _chosen(device, gpus)
    count = workers or (1 if spread or not on_gpus else len(on_gpus))
    each = threads or max(1, cores // count)
    if not on_gpus:
        # An empty value hides all GPUs, so that no library initializes one.
        return (Placement(device, each, "" if device == "cpu" else None),) * count
    if count > len(on_gpus):
        raise InputError(
            f"--workers is {count}, but there is a GPU for only {len(on_gpus)} of them: lower --workers, or choose "
            "--device cpu"
        )
    share = len(on_gpus) // count if spread else 1
    return tuple(
        Placement("cuda", each, ",".join(on_gpus[index * share : (index + 1) * share])) for index in range(count)
    )


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
