"""Save, load and merge tuned norm scales: a PEFT LN-tuning folder that PEFT and transformers open directly.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's; `ofa_config.json` records how the adapter was made
(task, shots, seed, versions, scores, fingerprints of the base); `README.md` is the model card.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ofa import sharding
from ofa._version import __version__
from ofa.adapters.base_norms import fingerprints
from ofa.adapters.base_weights import difference, weight_digests
from ofa.adapters.folder import CARD, CONFIG, DETAILS, WEIGHTS, read_config, read_details
from ofa.adapters.model_card import model_card
from ofa.errors import InputError
from ofa.files import WRITE_ERRORS, at_home, claimed_folder, json_writer, reason, text_writer, write_together
from ofa.models.types import Tokenizer
from ofa.tuning.norms import base_parameters, hold_norms

_PREFIX = "base_model.model."
_LAYER = ".ln_tuning_layers."

_warned: weakref.WeakKeyDictionary[nn.Module, set[Path]] = weakref.WeakKeyDictionary()
"""Adapters, by model, for which a warning about another base was logged."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder in memory: its base, norm parameters by path, and `ofa_config.json` as `details`.

    Example:
        >>> adapter = ofa.load_adapter(model, ofa.save_adapter(model, folder / "adapter"))
        >>> next(iter(adapter.parameters))
        'model.layers.0.input_layernorm.weight'
    """

    folder: Path
    base: str | None
    parameters: dict[str, Tensor]
    details: dict[str, Any]


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str | None = None,
    details: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the norm scales of `model` as a PEFT LN-tuning folder: every norm, tuned or not, and its untuned shift.

    In a distributed run, call it on every rank: rank 0 writes, and all ranks return when the folder is complete. If the
    model is not sharded, rank 0 may call it alone.

    Args:
        base_model: hub id or folder of the base; None uses the model's own name.
        details: entries for `ofa_config.json` besides versions and the base's fingerprints.
        overwrite: write into a folder that is not empty.

    Returns:
        The folder.

    Raises:
        InputError: a scale is not finite, the folder cannot be written or is not empty, or the scales of a rank differ
            from those of rank 0.

    Example:
        >>> params = ofa.tune_norms(model)
        >>> path = ofa.save_adapter(model, folder / "adapter")
        >>> sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors', 'ofa_config.json']
    """
    model = sharding.unwrapped(model)
    sharding.reshard(model)
    base = base_parameters(model)
    current = {path: sharding.full_tensor(model.get_parameter(path)).detach() for path in base}
    broken = _not_finite(current)
    if broken:
        raise InputError(
            f"{broken} is not finite because the training diverged, so no adapter was written to {folder}; train again "
            "with a lower learning rate"
        )
    tensors = {_key(path): value.to("cpu", torch.float32).contiguous() for path, value in current.items()}
    known = {**(details or {}), **fingerprints(model)}  # gathered by all ranks

    def write() -> None:
        _write(model, at_home(folder), base, tensors, base_model=base_model, details=known, overwrite=overwrite)

    sharding.on_first_rank(f"writing {folder}", _exact_digest(tensors), write)
    return at_home(folder)


def _write(
    model: nn.Module,
    folder: Path,
    base: dict[str, Tensor],
    tensors: dict[str, Tensor],
    *,
    base_model: str | None,
    details: dict[str, Any],
    overwrite: bool,
) -> None:
    from peft import LNTuningConfig
    from safetensors.torch import save_file
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    scales = {path: value for path, value in base.items() if path.endswith(".weight")}
    name = base_model or getattr(getattr(model, "config", None), "name_or_path", "") or None
    is_causal = sharding.own_class(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    config = LNTuningConfig(
        target_modules=[path.removesuffix(".weight") for path in scales],
        task_type="CAUSAL_LM" if is_causal else None,
        base_model_name_or_path=name,
        inference_mode=True,
    ).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    known = {
        **details,
        "base_model": name,
        "base_weights": weight_digests(model),
        "parameters": sum(scale.numel() for scale in scales.values()),
        "versions": versions(),
    }
    with claimed_folder(folder, overwrite=overwrite) as target:
        write_together(
            {
                target / WEIGHTS: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
                target / DETAILS: json_writer(known),
                target / CARD: text_writer(model_card(known, config["task_type"])),
                # Last: this file makes the folder an adapter.
                target / CONFIG: json_writer(config),
            }
        )


def read_adapter(folder: str | Path) -> Adapter:
    """Read and check an adapter folder; safetensors only.

    Raises:
        InputError: it is not an LN-tuning folder, has only a pickle, or its tensors are damaged.
    """
    path = at_home(folder)
    config = read_config(path)
    tensors = _read_tensors(path)
    strange = [key for key in tensors if not (key.startswith(_PREFIX) and _LAYER in key)]
    if strange or not tensors:
        what = f"holds {strange[0]}, which is no norm scale" if strange else "holds no tensors"
        raise InputError(f"{path / WEIGHTS} {what}; save the adapter again")
    parameters = {key.removeprefix(_PREFIX).replace(_LAYER, "."): value for key, value in tensors.items()}
    broken = _not_finite(parameters)
    if broken:
        raise InputError(f"{path / WEIGHTS} is damaged: {broken} is not finite; save the adapter again")
    return Adapter(path, config.get("base_model_name_or_path"), parameters, read_details(path))


def load_adapter(model: nn.Module, folder: str | Path | Adapter) -> Adapter:
    """Replace the norm scales of a base model by an adapter's; `restore_norms` restores them.

    The model changes only if the whole adapter fits.

    Returns:
        The adapter that was loaded.

    Raises:
        InputError: the folder cannot be read, or belongs to a base with other norms or another width.

    Example:
        >>> path = ofa.save_adapter(model, folder / "adapter")
        >>> adapter = ofa.load_adapter(model, path)
        >>> len(adapter.parameters)
        7
        >>> ofa.restore_norms(model)
    """
    adapter = folder if isinstance(folder, Adapter) else read_adapter(folder)
    check_fit(sharding.unwrapped(model), adapter)
    hold_norms(model)
    model = sharding.unwrapped(model)
    for path, value in adapter.parameters.items():
        sharding.copy_to_shards(model.get_parameter(path), value)
    return adapter


def merge(
    model: nn.Module | str,
    adapter: str | Path,
    out: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a full checkpoint of the base with the adapter's scales in place of its own.

    Args:
        model: the base; or its hub id or folder, which is loaded in its own dtype. A given model is not modified, even
            if its scales are tuned.
        tokenizer: saved with the model; if `model` is a name, the base's tokenizer is the default.

    Returns:
        The folder.

    Raises:
        InputError: the adapter does not fit, or the folder cannot be written.

    Example:
        >>> path = ofa.save_adapter(model, folder / "adapter")
        >>> ofa.merge(model, path, folder / "checkpoint", tokenizer=tokenizer).name
        'checkpoint'
    """
    if isinstance(model, str):
        from ofa.models.load import load_model

        loaded = load_model(model, dtype="auto", tokenizer_as_it_came=True)
        return merge(loaded.model, adapter, out, tokenizer=tokenizer or loaded.tokenizer, overwrite=overwrite)
    if sharding.is_sharded(model):
        raise InputError(
            "a sharded model cannot be merged; save the adapter, and merge it with the base's name or folder"
        )
    read = read_adapter(adapter)
    check_fit(model, read)
    with claimed_folder(out, overwrite=overwrite) as target:
        staging = target / ".partial"
        try:
            model.save_pretrained(staging, state_dict=_merged_state(model, read))  # type: ignore[operator]
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
            for file in sorted(staging.iterdir()):
                shutil.move(file, target / file.name)
        except WRITE_ERRORS as error:
            raise InputError(f"the checkpoint {target} cannot be written ({reason(error)}); free its disk") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def _exact_digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for value in tensors.values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that an adapter was made with."""
    from importlib.metadata import version

    return {"ofa-adapt": __version__, **{name: version(name) for name in ("torch", "transformers", "peft")}}


def _merged_state(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The base's state dict with the adapter's scales, in the base's dtype; the model is not modified."""
    base = base_parameters(model)
    scales = {path: value.to(base[path]) for path, value in adapter.parameters.items()}
    return {**model.state_dict(), **base, **scales}


def check_fit(model: nn.Module, adapter: Adapter) -> None:
    """Refuse an adapter of another base; say, once, where only the weights beside the norms differ.

    Raises:
        InputError: the model has no such norm, another width, or other norms of its own.
    """
    own = base_parameters(model)
    name = adapter.base or "another model"
    unknown = next((path for path in adapter.parameters if path not in own), None)
    if unknown:
        raise InputError(
            f"{adapter.folder} was made for {name}: this model has no norm {unknown}; load that base instead"
        )
    for path, value in adapter.parameters.items():
        if value.shape != own[path].shape:
            raise InputError(
                f"{adapter.folder} was made for {name} of another width: {path} has {own[path].numel()} channels here "
                f"and {value.numel()} in the adapter; load that base instead"
            )
    actual = fingerprints(model)
    expected = {adapter.details[name] for name in actual if name in adapter.details}
    if expected and expected.isdisjoint(actual.values()):
        raise InputError(
            f"{adapter.folder} was made for {name}, and this model's own norms differ; load that base instead"
        )
    warned = _warned.setdefault(model, set())
    differing = difference(adapter.details.get("base_weights", {}), model)
    if differing is not None and adapter.folder not in warned:
        warned.add(adapter.folder)
        logger.warning(
            "%s was made for %s: this model has the same norms but other weights (%s), so predictions may differ; load "
            "that base, or test this one with `ofa evaluate`",
            adapter.folder,
            name,
            differing,
        )


def _not_finite(parameters: dict[str, Tensor]) -> str | None:
    """The first parameter that holds a NaN or an infinity."""
    return next((name for name, value in parameters.items() if not torch.isfinite(value).all()), None)


def _key(path: str) -> str:
    norm, _, name = path.rpartition(".")
    return f"{_PREFIX}{norm}{_LAYER}{name}"


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
