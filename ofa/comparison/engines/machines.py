"""Options for where the cells of a comparison run, and the engine they select."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ofa.comparison.engines import Engine, Placement, Source
from ofa.comparison.engines.local import LocalEngine
from ofa.comparison.engines.placement import available_cores, placements, visible_gpus
from ofa.comparison.engines.ray import check_installed, ray_engine
from ofa.errors import InputError


class Machines(BaseModel):
    """The engine, its workers, and their options for loading the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: Literal["local", "ray"] = "local"
    workers: int | None = Field(None, ge=1)
    workers_per_gpu: int = Field(1, ge=1)
    ray_address: str | None = None
    device: str = "auto"
    device_map: str | None = None
    batch_size: int = Field(16, ge=1)
    threads: int | None = Field(None, ge=1)
    offline: bool = False
    trust_remote_code: bool = False

    def source(self, model: str | None, dtype: str) -> Source:
        """The model that these workers load."""
        return Source(model, dtype, self.device_map, self.trust_remote_code, self.offline, self.batch_size)


def check_machines(machines: Machines) -> None:
    """Check early that the engine can start.

    Raises:
        InputError: Ray is missing, there are too few GPUs, options contradict, or a launcher started several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "ofa compare starts its workers itself: leave out `accelerate launch`, pass --workers for several cells at "
            "once, and --device-map auto for a model that needs several GPUs"
        )
    if machines.engine == "ray":
        check_installed()
        if machines.threads is not None:
            raise InputError("--threads has no effect with Ray, which assigns the cores of a cluster: leave it out")
    elif machines.ray_address is not None:
        raise InputError("--ray-address has no effect with the local engine: add --engine ray")
    else:
        _local_placements(machines)


def foreseen_workers(machines: Machines) -> int:
    """How many cells will run at once, as far as it is known without a cluster."""
    if machines.engine == "local":
        return len(_local_placements(machines))
    return machines.workers or 1


@contextmanager
def open_engine(machines: Machines, source: Source) -> Iterator[Engine]:
    """The selected engine; a cluster that it started ends with it.

    Raises:
        InputError: see `check_machines`; or the Ray cluster cannot be reached.
    """
    if machines.engine == "local":
        yield LocalEngine(source, _local_placements(machines))
        return
    with ray_engine(
        source,
        address=machines.ray_address,
        workers=machines.workers,
        workers_per_gpu=machines.workers_per_gpu,
        device=machines.device,
        cores=available_cores(),
    ) as engine:
        yield engine


def _local_placements(machines: Machines) -> tuple[Placement, ...]:
    found = placements(
        machines.workers,
        machines.device,
        device_map=machines.device_map,
        gpus=visible_gpus(),
        cores=available_cores(),
        workers_per_gpu=machines.workers_per_gpu,
    )
    return found if machines.threads is None else tuple(replace(one, threads=machines.threads) for one in found)
