"""Makes the norm scales the only thing that trains, and undoes it.

A scale near 1 does not move in bfloat16 for steps below 2e-3, so tuned scales are float32 (float64 in a float64 model)
whatever the model's dtype; their norms then compute in that precision and return the dtype they were given.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ofa import anatomy

_originals: weakref.WeakKeyDictionary[nn.Module, _Original] = weakref.WeakKeyDictionary()


def tune_norms(model: nn.Module) -> list[nn.Parameter]:
    """Freeze the model and make the scale γ of every norm trainable.

    The scales become float32 parameters of their own, so that `restore_norms` can bring the model's back untouched.
    Calling it again keeps the current values.

    Returns:
        The tuned parameters, one (d,) vector per norm, in model order.

    Raises:
        InputError: the model has no norm with a one-dimensional weight.
    """
    tuned = hold_norms(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in tuned.values():
        parameter.requires_grad_(True)
    return list(tuned.values())


def restore_norms(model: nn.Module) -> None:
    """Bring back the scales, gradient flags and norms that the model had before `tune_norms` or `load_adapter`.

    Does nothing on a model that is as it was.
    """
    original = _originals.pop(model, None)
    if original is None:
        return
    for handle in original.handles:
        handle.remove()
    for path, parameters in original.parameters.items():
        module = model.get_submodule(path)
        for name, parameter in parameters.items():
            setattr(module, name, parameter)
    for parameter, requires_grad in original.requires_grad:
        parameter.requires_grad_(requires_grad)


def hold_norms(model: nn.Module) -> dict[str, nn.Parameter]:
    """Give every norm a scale (and shift) of its own in at least float32, frozen at first; norm path → scale."""
    norms = anatomy.tuned_norms(model)
    if model not in _originals:
        original = _Original(requires_grad=[(p, p.requires_grad) for p in model.parameters()])
        for norm in norms:
            _hold(model.get_submodule(norm.path), norm.path, original)
        _originals[model] = original
    return {norm.path: model.get_parameter(f"{norm.path}.weight") for norm in norms}


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Scale and shift of every norm as the model was loaded, whatever has been tuned since; parameter path → (d,)."""
    original = _originals.get(model)
    held = original.parameters if original is not None else _norm_parameters(model)
    return {f"{path}.{name}": value.detach() for path, own in held.items() for name, value in own.items()}


def _norm_parameters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    return {norm.path: _own(model.get_submodule(norm.path)) for norm in anatomy.tuned_norms(model)}


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: value for name in ("weight", "bias") if isinstance(value := getattr(module, name, None), nn.Parameter)
    }


@dataclass
class _Original:
    requires_grad: list[tuple[nn.Parameter, bool]]
    parameters: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)


def _hold(module: nn.Module, path: str, original: _Original) -> None:
    own = original.parameters[path] = _own(module)
    narrow = own["weight"].dtype
    wide = torch.promote_types(narrow, torch.float32)
    for name, parameter in own.items():
        setattr(module, name, nn.Parameter(parameter.detach().to(wide, copy=True), requires_grad=False))
    if wide != narrow:
        precision = _Precision(wide)
        original.handles.append(module.register_forward_pre_hook(precision.widen))
        original.handles.append(module.register_forward_hook(precision.narrow))


class _Precision:
    """Lets a norm compute in the precision of its scale and return the dtype it was given."""

    def __init__(self, wide: torch.dtype) -> None:
        self._wide = self._given = wide

    def widen(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self._given = args[0].dtype
        return (args[0].to(self._wide), *args[1:])

    def narrow(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.to(self._given)
