"""Save, load and merge tuned norm scales: a PEFT LN-tuning folder that PEFT and transformers open directly.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's; `ofa_config.json` records how the adapter was made
(task, shots, seed, versions, scores, fingerprints of the base); `README.md` is the model card.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ofa import sharding
from ofa.adapters.base_norms import fingerprints
from ofa.adapters.base_weights import weight_digests
from ofa.adapters.folder import NORMS
from ofa.adapters.peft_folder import merged_with_peft
from ofa.adapters.read import PREFIX, Adapter, norm_key, read_adapter, read_any_adapter
from ofa.adapters.same_base import Base, base_facts, check_base
from ofa.adapters.write import write_adapter, write_checkpoint
from ofa.errors import InputError
from ofa.models.types import Tokenizer
from ofa.tuning.heads import ReplacedHead, hold_head, trained_head
from ofa.tuning.norms import base_parameters, hold_norms


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str | None = None,
    details: dict[str, object] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the norm scales of `model` as a PEFT LN-tuning folder: every norm, tuned or not, and its untuned shift.

    A classification head that trains beside them is written too, as PEFT's `modules_to_save`.

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
    heads = trained_head(model)
    keys = {path: norm_key(path) for path in base}
    keys |= {f"{head}.{name}": "" for head in heads for name, _ in model.get_submodule(head).named_parameters()}
    current = {path: sharding.full_tensor(model.get_parameter(path)).detach() for path in keys}
    tensors = {
        keys[path] or f"{PREFIX}{path}": value.to("cpu", torch.float32).contiguous() for path, value in current.items()
    }
    known = {**(details or {}), **fingerprints(model)}  # gathered by all ranks
    scales = {path: value for path, value in base.items() if path.endswith(".weight")}
    named: dict[str, str | None] = {"base_model": base_model} if base_model else base_facts(model)
    config = _peft_config(model, list(scales), heads, named["base_model"])
    parameters = sum(scale.numel() for scale in scales.values())
    facts = {**named, "base_weights": weight_digests(model), "parameters": parameters}
    whole: Any = model
    base_config = whole.config.to_dict() if heads else None
    return write_adapter(folder, tensors, config, {**known, **facts}, base_config=base_config, overwrite=overwrite)


def load_adapter(model: nn.Module, folder: str | Path | Adapter) -> Adapter:
    """Replace the norm scales of a base model by an adapter's, and an encoder's head; `restore_norms` restores them.

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
    if adapter.head:
        hold_head(model, adapter.labels)
    for path, value in {**adapter.parameters, **adapter.head}.items():
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
    """Write a full checkpoint of the base with the adapter in it, of norm scales, LoRA or IA3.

    Args:
        model: the base; or its hub id or folder, which is loaded in its own dtype. A given model is not modified, even
            if its scales are tuned; LoRA and IA3 are merged into a copy of it.
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
    read = read_any_adapter(adapter)
    if read.kind != NORMS:
        return write_checkpoint(merged_with_peft(model, read), None, out, tokenizer=tokenizer, overwrite=overwrite)
    check_fit(model, read)
    with ExitStack() as undo:
        if read.head:  # for the shapes and the labels of the checkpoint
            undo.callback(ReplacedHead(model, read.labels).remove)
        return write_checkpoint(model, _merged_state(model, read), out, tokenizer=tokenizer, overwrite=overwrite)


def _peft_config(model: nn.Module, scales: list[str], heads: Sequence[str], base: str | None) -> dict[str, object]:
    from peft import LNTuningConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    kind = sharding.own_class(model).__name__
    task_type = "CAUSAL_LM" if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else None
    if heads and kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        task_type = "SEQ_CLS"
    config = LNTuningConfig(
        target_modules=[path.removesuffix(".weight") for path in scales],
        modules_to_save=list(heads) or None,
        task_type=task_type,
        base_model_name_or_path=base,
        inference_mode=True,
    ).to_dict()
    return {**config, "target_modules": sorted(config["target_modules"])}


def _merged_state(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The base's state dict with the adapter's scales, in the base's dtype; the model is not modified."""
    base = base_parameters(model)
    scales = {path: value.to(base[path]) for path, value in adapter.parameters.items()}
    head = {path: value.to(next(iter(base.values()))) for path, value in adapter.head.items()}
    return {**model.state_dict(), **base, **scales, **head}


def check_fit(model: nn.Module, adapter: Adapter, base: Base | None = None) -> None:
    """Refuse an adapter of another base; say, once, where only the weights beside the norms differ.

    `base` is the model's, if it is known.

    Raises:
        InputError: the model has no such norm, another width, or other norms of its own.
    """
    base = base or Base.of(model)
    own = base.parameters
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
    if adapter.head:
        _check_head(model, adapter)
    check_base(model, adapter, base)


def _check_head(model: nn.Module, adapter: Adapter) -> None:
    head = ReplacedHead(model, adapter.labels)
    try:
        shapes = {path: parameter.shape for path, parameter in head.parameters().items()}
    finally:
        head.remove()
    if any(shapes.get(path) != value.shape for path, value in adapter.head.items()):
        raise InputError(
            f"{adapter.folder} holds a head of other layers than that of a {type(model).__name__}; load its base, "
            f"{adapter.base or 'which it does not name'}, with AutoModelForSequenceClassification"
        )
