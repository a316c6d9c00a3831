"""Models that several processes train together: wrapped by DistributedDataParallel, or sharded by FSDP2.

FSDP2 (`torch.distributed.fsdp.fully_shard`) replaces the class of each module it is applied to and makes its parameters
DTensors, of which each rank holds a shard. They are gathered only while the module computes.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ofa.errors import InputError, first_sentence

WAIT = timedelta(minutes=10)
"""How long the other ranks wait for rank 0."""

_calls: Counter[str] = Counter()
"""Calls of `on_first_rank` so far, by `about`; the same on every rank."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel` and `torch.compile`, or the model itself.

    Raises:
        InputError: it is wrapped by `DataParallel`, which runs copies, or FSDP1, which flattens parameters.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    if is_a(model, "torch._dynamo.eval_frame", "OptimizedModule"):
        return unwrapped(model._orig_mod)  # type: ignore[arg-type]
    if isinstance(model, nn.DataParallel):
        raise InputError(
            "nn.DataParallel runs copies of the model, which cannot be measured; start one process per device and use "
            "DistributedDataParallel"
        )
    if any(is_a(module, "torch.distributed.fsdp", "FullyShardedDataParallel") for module in model.modules()):
        raise InputError(
            "FullyShardedDataParallel (FSDP1) hides the norm scales in flattened parameters; use FSDP2, "
            "torch.distributed.fsdp.fully_shard"
        )
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the model or to a part of it."""
    return any(is_unit(module) for module in model.modules())


def is_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to this module itself."""
    return is_a(module, "torch.distributed.fsdp", "FSDPModule")


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: sharded or replicated over the ranks."""
    return is_a(tensor, "torch.distributed.tensor", "DTensor")


def own_class(module: nn.Module) -> type:
    """The class that a module had before `fully_shard` replaced it."""
    if not is_unit(module):
        return type(module)
    from torch.distributed.fsdp import FSDPModule

    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def reshard(model: nn.Module) -> None:
    """Reshard every parameter: after a forward pass some stay gathered for the backward pass."""
    for module in filter(is_unit, model.modules()):
        module.reshard()  # type: ignore[operator]


def full_tensor(tensor: Tensor) -> Tensor:
    """A DTensor gathered from all ranks; a plain tensor unchanged.

    Raises:
        InputError: a rank did not take part.
    """
    if not is_dtensor(tensor):
        return tensor
    local: Any = tensor.detach()
    try:
        # Shards offloaded to the CPU are gathered on the mesh's device, where the ranks communicate.
        return local.to(local.device_mesh.device_type).full_tensor()
    except RuntimeError as error:
        raise InputError(
            f"a sharded parameter could not be gathered ({first_sentence(error)}); call this on every rank, while "
            "all of them are alive"
        ) from error


@torch.no_grad()
def copy_to_shards(parameter: Tensor, value: Tensor) -> None:
    """Write a full value into a parameter of which each rank keeps its own shard, without communication."""
    if is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        value = value.to(sharded.device_mesh.device_type, parameter.dtype)
        value = distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
        value = value.to(parameter.device)
    parameter.copy_(value)


def on_first_rank(about: str, digest: str, work: Callable[[], None]) -> None:
    """Do some work, such as writing, on rank 0 only; the other ranks return once it has finished.

    Rank 0 does not wait for the others, so calling this on rank 0 alone is fine.

    Args:
        about: the work in words that follow "to finish", the same on every rank.
        digest: hash of the work's input, so that a rank notices if rank 0 holds a different one.
        work: called on rank 0.

    Raises:
        InputError: `work` raised one on rank 0 (raised on every rank); or, on the other ranks, rank 0 did not answer or
            its digest differs.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        work()
        return
    store = distributed.distributed_c10d._get_default_store()
    _calls[about] += 1
    key = f"ofa/{about}/{_calls[about]}"
    if distributed.get_rank() > 0:
        _follow(store, key, about, digest)
        return
    failure: str | None = f"rank 0 was stopped in {about}"
    try:
        work()
        failure = None
    except InputError as error:
        failure = str(error)
        raise
    finally:
        store.set(key, json.dumps([failure, digest]))


def _follow(store: distributed.Store, key: str, about: str, digest: str) -> None:
    rank = distributed.get_rank()
    try:
        store.wait([key], WAIT)
        failure, first = json.loads(store.get(key))
    except RuntimeError as error:
        raise InputError(
            f"rank {rank} waited for rank 0 to finish {about} and got no answer; call this on every rank with the same "
            "folder, or on rank 0 alone"
        ) from error
    if failure is not None:
        raise InputError(failure)
    if first != digest:
        raise InputError(
            f"rank {rank} and rank 0 hold different norm scales in {about}; call tune_norms before wrapping the model, "
            "so that the gradients are averaged over the ranks"
        )


def is_a(value: object, module: str, name: str) -> bool:
    """`isinstance` without importing the class: if its module was never imported, no value can be of that class."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)
