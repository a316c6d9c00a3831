"""Models that several processes train together: wrapped by DistributedDataParallel, or sharded by FSDP2.

FSDP2 (`torch.distributed.fsdp.fully_shard`) renames the classes of the modules it is applied to and makes their
parameters DTensors, of which each rank holds a part; while such a module computes, and only then, they are whole.
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

from ofa.errors import InputError

WAIT = timedelta(minutes=10)
"""How long the other ranks wait for the first one."""

_calls: Counter[str] = Counter()
"""How often `on_first_rank` was called, by what it was about; the ranks count alike."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a `DistributedDataParallel` or what `torch.compile` returned, or the model itself.

    Raises:
        InputError: it is wrapped by something that runs copies or flattened parameters of it.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    if is_a(model, "torch._dynamo.eval_frame", "OptimizedModule"):
        return unwrapped(model._orig_mod)  # type: ignore[arg-type]
    if isinstance(model, nn.DataParallel):
        raise InputError(
            "nn.DataParallel runs copies of the model that cannot be measured; start one process per device and use "
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
    """Whether `fully_shard` was applied to this very module."""
    return is_a(module, "torch.distributed.fsdp", "FSDPModule")


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this rank holds a part of a tensor, or its own copy of one that belongs to all ranks: a DTensor."""
    return is_a(tensor, "torch.distributed.tensor", "DTensor")


def own_class(module: nn.Module) -> type:
    """The class that a module had before `fully_shard` made one of its own for it."""
    if not is_unit(module):
        return type(module)
    from torch.distributed.fsdp import FSDPModule

    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def reshard(model: nn.Module) -> None:
    """Put every parameter back into its shards: behind a forward pass some stay whole until the backward pass."""
    for module in filter(is_unit, model.modules()):
        module.reshard()  # type: ignore[operator]


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with all its parts, gathered from the ranks that hold them; a plain tensor as it is.

    Raises:
        InputError: a rank did not take part.
    """
    if not is_dtensor(tensor):
        return tensor
    local: Any = tensor.detach()
    try:
        # Parts that are offloaded to the CPU are gathered where the ranks can talk.
        return local.to(local.device_mesh.device_type).full_tensor()
    except RuntimeError as error:
        raise InputError(
            f"a sharded parameter could not be gathered ({str(error).splitlines()[0]}); call this on every rank, while "
            "all of them are alive"
        ) from error


@torch.no_grad()
def copy_to_shards(parameter: Tensor, value: Tensor) -> None:
    """Write a whole value into a parameter, of which each rank keeps its own part; nothing is communicated."""
    if is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        value = value.to(sharded.device_mesh.device_type, parameter.dtype)
        value = distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
        value = value.to(parameter.device)
    parameter.copy_(value)


def on_first_rank(about: str, digest: str, work: Callable[[], None]) -> None:
    """Let rank 0 do some work, such as writing; the other ranks, where they call this too, return behind it.

    Rank 0 does not wait for the others, so that it may also be called there alone.

    Args:
        about: what it is, a clause behind "to finish", the same on every rank.
        digest: of what the work is done with, so that a rank notices if rank 0 holds something else.
        work: what only rank 0 does.

    Raises:
        InputError: on every rank what `work` raises on rank 0; elsewhere also that rank 0 does not answer, or holds
            something else.
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


def _follow(store: Any, key: str, about: str, digest: str) -> None:
    rank = distributed.get_rank()
    try:
        store.wait([key], WAIT)
        failure, first = json.loads(store.get(key))
    except RuntimeError as error:
        raise InputError(
            f"rank {rank} waited in vain for rank 0 to finish {about}; call this on every rank with the same folder, "
            "or on rank 0 alone"
        ) from error
    if failure is not None:
        raise InputError(failure)
    if first != digest:
        raise InputError(
            f"rank {rank} holds other norm scales than rank 0 did in {about}; call tune_norms before the model is "
            "wrapped, so that the gradients are averaged over the ranks"
        )


def is_a(value: object, module: str, name: str) -> bool:
    """Whether a value is of a class whose module is slow to import, and need not be: else nothing is of that class."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)
