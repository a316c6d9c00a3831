"""Makes the norm scales the only thing that trains, and undoes it.

A scale near 1 does not move in bfloat16 for steps below 2e-3, so tuned scales are float32 (float64 in a float64 model)
whatever the model's dtype; their norms then compute in that precision and return the dtype they were given, on a GPU by
the kernel of `fused_norms`.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ofa import anatomy, sharding
from ofa.errors import InputError
from ofa.tuning import fused_norms
from ofa.tuning.bitsandbytes_layers import TrainableLayers

_originals: weakref.WeakKeyDictionary[nn.Module, _Original] = weakref.WeakKeyDictionary()


def tune_norms(model: nn.Module) -> list[nn.Parameter]:
    """Freeze the model and make the scale γ of every norm trainable.

    The scales become float32 parameters of their own, so that `restore_norms` can bring the model's back untouched.
    Calling it again keeps the current values. Of a model that `fully_shard` was applied to, every rank tunes its own
    part of the scales in place; call it on all ranks.

    Returns:
        The tuned parameters, one (d,) vector per norm, in model order.

    Raises:
        InputError: the model has no norm with a one-dimensional weight; it is wrapped already; it is sharded already,
            and its scales are narrower than float32; its 4-bit layers have been packed for inference.
    """
    layers = TrainableLayers(sharding.unwrapped(model))
    tuned = hold_norms(model)
    model = sharding.unwrapped(model)
    _originals[model].handles.append(layers)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in tuned.values():
        parameter.requires_grad_(True)
    return list(tuned.values())


def restore_norms(model: nn.Module) -> None:
    """Bring back the scales, gradient flags and norms that the model had before `tune_norms` or `load_adapter`.

    Does nothing on a model that is as it was.

    Raises:
        InputError: the model was sharded in between.
    """
    model = sharding.unwrapped(model)
    original = _originals.get(model)
    if original is None:
        return
    if sharding.is_sharded(model) and not original.in_place:
        raise InputError(
            "the model was sharded after its norms were tuned, and fully_shard keeps the tuned ones; load the model "
            "again to have its own"
        )
    del _originals[model]
    sharding.reshard(model)
    for handle in original.handles:
        handle.remove()
    for path, parameters in original.parameters.items():
        module = model.get_submodule(path)
        fused_norms.restore(module)
        for name, parameter in parameters.items():
            if original.in_place:
                sharding.copy_to_shards(getattr(module, name), parameter)
            else:
                setattr(module, name, parameter)
    for parameter, requires_grad in original.requires_grad:
        parameter.requires_grad_(requires_grad)


def hold_norms(model: nn.Module) -> dict[str, nn.Parameter]:
    """Give every norm a scale (and shift) of its own in at least float32, frozen at first; norm path → scale."""
    inner = sharding.unwrapped(model)
    if inner is not model and inner not in _originals:
        raise InputError(
            f"the norms are inside of a {type(model).__name__}, which would not average the gradients of new scales; "
            "call tune_norms (or load_adapter) on the model before it is wrapped"
        )
    model = inner
    sharding.reshard(model)
    norms = anatomy.tuned_norms(model)
    if model not in _originals:
        original = _Original([(p, p.requires_grad) for p in model.parameters()], sharding.is_sharded(model))
        for norm in norms:
            hold = _hold_part if original.in_place else _hold
            hold(model.get_submodule(norm.path), norm, original)
        _originals[model] = original
    return {norm.path: model.get_parameter(f"{norm.path}.weight") for norm in norms}


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Scale and shift of every norm as the model was loaded, whatever has been tuned since; parameter path → (d,).

    Those of a sharded model are gathered: call it on all ranks.
    """
    original = _originals.get(model)
    held = original.parameters if original is not None else _norm_parameters(model)
    values = {f"{path}.{name}": value for path, own in held.items() for name, value in own.items()}
    return {path: sharding.full_tensor(value).detach() for path, value in values.items()}


def _norm_parameters(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {norm.path: dict(_own(model.get_submodule(norm.path))) for norm in anatomy.tuned_norms(model)}


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: value for name in ("weight", "bias") if isinstance(value := getattr(module, name, None), nn.Parameter)
    }


@dataclass
class _Original:
    """What a model had. Tuned `in_place` its parameters stay the model's, and `parameters` are copies."""

    requires_grad: list[tuple[nn.Parameter, bool]]
    in_place: bool
    parameters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    handles: list[RemovableHandle | TrainableLayers] = field(default_factory=list)


def _hold_part(module: nn.Module, norm: anatomy.Norm, original: _Original) -> None:
    """`fully_shard` owns the parameters of its modules: they stay, and their values are kept."""
    own = _own(module)
    if own["weight"].dtype.itemsize < torch.float32.itemsize:
        raise InputError(
            f"{norm.path} is sharded in {str(own['weight'].dtype).removeprefix('torch.')}, in which scales near 1 do "
            "not move; call tune_norms before fully_shard, or load the model in float32 with a MixedPrecisionPolicy"
        )
    original.parameters[norm.path] = {name: value.detach().clone() for name, value in own.items()}


def _hold(module: nn.Module, norm: anatomy.Norm, original: _Original) -> None:
    own = _own(module)
    original.parameters[norm.path] = dict(own)
    narrow = own["weight"].dtype
    wide = torch.promote_types(narrow, torch.float32)
    for name, parameter in own.items():
        setattr(module, name, nn.Parameter(parameter.detach().to(wide, copy=True), requires_grad=False))
    if wide != narrow:
        fused_norms.fuse(module, norm)
        precision = _Precision(wide)
        original.handles.append(module.register_forward_pre_hook(precision.widen))
        original.handles.append(module.register_forward_hook(precision.narrow))


class _Precision:
    """Lets a norm compute in the precision of its scale and return the dtype it was given."""

    def __init__(self, wide: torch.dtype) -> None:
        self._wide = self._given = wide

    def widen(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self._given = args[0].dtype
        if fused_norms.takes(module, args[0]):
            return args
        return (args[0].to(self._wide), *args[1:])

    def narrow(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.to(self._given)
