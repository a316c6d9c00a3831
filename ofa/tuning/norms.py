"""Makes the norm scales the only trained parameters, and undoes it.

In bfloat16 a scale near 1 does not change for steps below 2e-3. So tuned scales are float32 (float64 in a float64
model), and their norms compute in that precision and return the dtype of their input, on a GPU by `fused_norms`.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ofa import anatomy, sharding
from ofa.anatomy import fused_norms
from ofa.errors import InputError
from ofa.tuning.bitsandbytes_layers import TrainableLayers


class Removable(Protocol):
    """What `restore_norms` undoes."""

    def remove(self) -> None:
        """Undo it."""


_originals: weakref.WeakKeyDictionary[nn.Module, _Original] = weakref.WeakKeyDictionary()


def tune_norms(model: nn.Module) -> list[nn.Parameter]:
    """Freeze the model and make the scale γ of every norm trainable.

    The scales are replaced by float32 copies, and `restore_norms` puts the originals back. A second call keeps the
    current values. In a model that `fully_shard` was applied to, every rank tunes its own shard of the scales in place;
    call it on all ranks.

    Returns:
        The tuned parameters, one (d,) vector per norm, in model order.

    Raises:
        InputError: the model has no norm with a one-dimensional weight, is already wrapped, is already sharded with
            scales narrower than float32, or has 4-bit layers packed for inference.

    Example:
        >>> params = ofa.tune_norms(model)
        >>> len(params), params[0].shape, params[0].dtype  # two norms in each of three layers, and the last
        (7, torch.Size([64]), torch.float32)
        >>> sum(parameter.requires_grad for parameter in model.parameters())
        7
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
    """Restore the scales, gradient flags and norms that the model had before `tune_norms` or `load_adapter`.

    Does nothing on an unchanged model.

    Raises:
        InputError: the model was sharded since.

    Example:
        >>> before = model.model.norm.weight
        >>> ofa.tune_norms(model)[-1].data += 1
        >>> ofa.restore_norms(model)
        >>> model.model.norm.weight is before
        True
    """
    model = sharding.unwrapped(model)
    original = _originals.get(model)
    if original is None:
        return
    if sharding.is_sharded(model) and not original.in_place:
        raise InputError(
            "the model was sharded after its norms were tuned, and fully_shard keeps the tuned scales; load the model "
            "again to get its original scales"
        )
    del _originals[model]
    sharding.reshard(model)
    for handle in reversed(original.handles):
        handle.remove()
    for path, parameters in original.parameters.items():
        module = model.get_submodule(path)
        fused_norms.restore(module, fused_norms.TUNED)
        for name, parameter in parameters.items():
            if original.in_place:
                sharding.copy_to_shards(getattr(module, name), parameter)
            else:
                setattr(module, name, parameter)
    for parameter, requires_grad in original.requires_grad:
        parameter.requires_grad_(requires_grad)


def hold_norms(model: nn.Module) -> dict[str, nn.Parameter]:
    """Replace the scale (and shift) of every norm by a frozen copy, float32 or wider; norm path → scale, (d,)."""
    inner = sharding.unwrapped(model)
    if inner is not model and inner not in _originals:
        raise InputError(
            f"the norms are inside a {type(model).__name__}, which would not average the gradients of new scales; call "
            "tune_norms (or load_adapter) on the model before wrapping it"
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


def undone_with_norms(model: nn.Module, handle: Removable) -> None:
    """Let `restore_norms` remove this handle too; the norms are tuned or loaded already."""
    _originals[sharding.unwrapped(model)].handles.append(handle)


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Scale and shift of every norm as they were loaded, before any tuning; parameter path → (d,).

    Gathers the parameters of a sharded model; call it on all ranks.
    """
    original = _originals.get(model)
    norms = () if original is not None else anatomy.tuned_norms(model)
    held = original.parameters if original is not None else {n.path: _own(model.get_submodule(n.path)) for n in norms}
    values = {f"{path}.{name}": value for path, own in held.items() for name, value in own.items()}
    return {path: sharding.full_tensor(value).detach() for path, value in values.items()}


def trained_norms(model: nn.Module) -> dict[str, nn.Parameter]:
    """Scale and shift of every norm whose scale trains; parameter path → (d,)."""
    paths = list(base_parameters(model))
    trained = {path.rpartition(".")[0] for path in paths if model.get_parameter(path).requires_grad}
    return {path: model.get_parameter(path) for path in paths if path.rpartition(".")[0] in trained}


def pretrained_scales(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Every tuned scale with the γ it was loaded with (Gemma's 1 + w included), both (d,), float32 or wider.

    Raises:
        InputError: `tune_norms` was not called on the model.
    """
    model = sharding.unwrapped(model)
    original = _originals.get(model)
    if original is None:
        raise InputError("the norms of this model are not tuned; call tune_norms on it first")
    pairs = {}
    for norm in anatomy.tuned_norms(model):
        scale = model.get_parameter(f"{norm.path}.weight")
        value = original.parameters[norm.path]["weight"].detach().to(scale.device, scale.dtype)
        pairs[scale] = value + norm.offset
    return pairs


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: value for name in ("weight", "bias") if isinstance(value := getattr(module, name, None), nn.Parameter)
    }


@dataclass
class _Original:
    """The state before tuning; `parameters` are copies if the model's own are tuned `in_place`."""

    requires_grad: list[tuple[nn.Parameter, bool]]
    in_place: bool
    parameters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    handles: list[Removable] = field(default_factory=list)


def _hold_part(module: nn.Module, norm: anatomy.Norm, original: _Original) -> None:
    """Keep a copy of a sharded norm's values; `fully_shard` owns the parameters, so they are tuned in place."""
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
        fused_norms.fuse(module, norm, fused_norms.TUNED)
        original.handles += compute_in(wide, module)


def compute_in(wide: torch.dtype, module: nn.Module) -> list[RemovableHandle]:
    """Let a module compute in the dtype of its parameters and return the dtype of its input."""
    precision = _Precision(wide)
    return [
        module.register_forward_pre_hook(precision.upcast),
        module.register_forward_hook(precision.restore),
    ]


class _Precision:
    """Hooks that let a module compute in one dtype and return the dtype of its input."""

    def __init__(self, wide: torch.dtype) -> None:
        self._wide = self._given = wide

    def upcast(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self._given = args[0].dtype
        if fused_norms.takes(module, args[0]) or fused_norms.known(module, args[0]) is not None:
            return args
        return (args[0].to(self._wide), *args[1:])

    def restore(self, module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
        return output.to(self._given)
