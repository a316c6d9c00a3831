"""Read and check an adapter folder into memory; safetensors only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ofa.adapters.folder import DETAILS, KINDS, NORMS, WEIGHTS, read_config, read_details, read_labels
from ofa.errors import InputError
from ofa.files import Json, at_home

PREFIX = "base_model.model."
_LAYER = ".ln_tuning_layers."


@dataclass(frozen=True)
class Adapter:
    """An adapter folder in memory: its base, its parameters, and `ofa_config.json` as `details`.

    `kind` is PEFT's type. Parameters are named by the path of the norm; those of another kind by PEFT's own keys. An
    encoder's adapter has `labels`, and its `head` beside the norms, by path.

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
    head: dict[str, Tensor] = field(default_factory=dict)
    labels: tuple[str, ...] = ()


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
    broken = not_finite(parameters)
    if broken:
        raise InputError(f"{path / WEIGHTS} is damaged: {plain_key(broken)} is not finite; save the adapter again")
    # Beside another kind norms are such modules too, and only a classifier has a head.
    has_head = config["peft_type"] == NORMS or config.get("task_type") == "SEQ_CLS"
    heads = tuple(f"{PREFIX}{module}." for module in config.get("modules_to_save") or () if has_head)
    head: dict[str, Tensor] = {}
    if config["peft_type"] == NORMS:
        head = {plain_key(key): value for key, value in parameters.items() if heads and key.startswith(heads)}
        parameters = _by_norm(path, {key: value for key, value in parameters.items() if plain_key(key) not in head})
    details = read_details(path)
    scales = sum(value.numel() for name, value in parameters.items() if name.endswith(".weight"))
    if config["peft_type"] == NORMS and scales < details.get("parameters", 0):
        raise InputError(
            f"{path / WEIGHTS} is damaged: it holds {scales:,} of the {details['parameters']:,} scales that {DETAILS} "
            "counts; copy or save the adapter again"
        )
    base, labels = config.get("base_model_name_or_path"), read_labels(path) if heads else ()
    return Adapter(path, base, parameters, details, config["peft_type"], head, labels)


def refuse_head(adapter: Adapter, what: str) -> None:
    """Raise `InputError` for an adapter with a classification head, which `what` has no place for."""
    if adapter.labels:
        raise InputError(
            f"{adapter.folder} holds the classification head of an encoder, for which {what} has no place; write a "
            "checkpoint with `ofa merge` instead"
        )


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
