"""Read and check an adapter folder into memory; safetensors only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ofa.adapters.folder import KINDS, NORMS, WEIGHTS, read_config, read_details
from ofa.errors import InputError
from ofa.files import Json, at_home

PREFIX = "base_model.model."
_LAYER = ".ln_tuning_layers."


@dataclass(frozen=True)
class Adapter:
    """An adapter folder in memory: its base, its parameters, and `ofa_config.json` as `details`.

    `kind` is PEFT's type. Parameters are named by the path of the norm; those of another kind by PEFT's own keys.

    Example:
        >>> adapter = ofa.load_adapter(model, ofa.save_adapter(model, folder / "adapter"))
        >>> adapter.kind, next(iter(adapter.parameters))
        ('LN_TUNING', 'model.layers.0.input_layernorm.weight')
    """

    folder: Path
    base: str | None
    parameters: dict[str, Tensor]
    details: Json
    kind: str = NORMS


def read_adapter(folder: str | Path) -> Adapter:
    """Read and check a folder of tuned norm scales.

    Raises:
        InputError: it is not an LN-tuning folder, has only a pickle, or its tensors are damaged.
    """
    read_config(folder, (NORMS,))
    return read_any_adapter(folder)


def read_any_adapter(folder: str | Path) -> Adapter:
    """Read and check an adapter folder of any of `KINDS`.

    Raises:
        InputError: it is no such folder, has only a pickle, or its tensors are damaged.
    """
    path = at_home(folder)
    config = read_config(path, tuple(KINDS))
    parameters = _read_tensors(path)
    if not parameters:
        raise InputError(f"{path / WEIGHTS} holds no tensors; save the adapter again")
    if config["peft_type"] == NORMS:
        parameters = _by_norm(path, parameters)
    broken = not_finite(parameters)
    if broken:
        raise InputError(f"{path / WEIGHTS} is damaged: {broken} is not finite; save the adapter again")
    base = config.get("base_model_name_or_path")
    return Adapter(path, base, parameters, read_details(path), config["peft_type"])


def not_finite(parameters: dict[str, Tensor]) -> str | None:
    """The first parameter that holds a NaN or an infinity."""
    return next((name for name, value in parameters.items() if not torch.isfinite(value).all()), None)


def norm_key(path: str) -> str:
    """PEFT's key of a norm's parameter."""
    norm, _, name = path.rpartition(".")
    return f"{PREFIX}{norm}{_LAYER}{name}"


def plain_key(key: str) -> str:
    """The path of a parameter in the base model, of PEFT's key."""
    return key.removeprefix(PREFIX).replace(_LAYER, ".")


def _by_norm(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    strange = next((key for key in tensors if not (key.startswith(PREFIX) and _LAYER in key)), None)
    if strange:
        raise InputError(f"{folder / WEIGHTS} holds {strange}, which is no norm scale; save the adapter again")
    return {plain_key(key): value for key, value in tensors.items()}


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
        if pickles:
            raise InputError(f"{pickles[0]} is a pickle, which can run code when loaded; convert it to {WEIGHTS}")
        raise InputError(f"{folder} has no {WEIGHTS}; give the folder that `ofa fit` wrote")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or truncated ({error}); copy or save the adapter again") from error
