"""Adapters of PEFT's other methods (LoRA, IA3, a soft prompt), also with norm scales: save, open and merge them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ofa.adapters.attach_peft import without_deprecations
from ofa.adapters.base_norms import fingerprints
from ofa.adapters.base_weights import weight_digests
from ofa.adapters.folder import KINDS
from ofa.adapters.read import PREFIX, Adapter
from ofa.adapters.same_base import base_facts, check_base
from ofa.adapters.write import write_adapter
from ofa.errors import InputError, first_sentence
from ofa.models.introspection import head_modules
from ofa.models.types import CausalLM
from ofa.tuning.heads import ReplacedHead
from ofa.tuning.norms import base_parameters, trained_norms

if TYPE_CHECKING:
    from peft import PeftConfig


def save_peft_adapter(
    model: CausalLM, folder: str | Path, *, details: dict[str, object], overwrite: bool = False
) -> Path:
    """Write the adapter "default" of a model as PEFT does, with `ofa_config.json` and a model card beside it.

    Norm scales that train beside it are written with their shifts, as PEFT's `modules_to_save`.

    Raises:
        InputError: a parameter is not finite, or the folder cannot be written or is not empty.
    """
    from peft import PeftModel, get_peft_model_state_dict

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # Embeddings are never trained here; PEFT's check for it would ask the hub.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    # Without PEFT's wrapper the keys lack the path of the model in it.
    prefix = "" if base is not model else PREFIX
    tensors = {f"{prefix}{key}": value for key, value in tensors.items()}
    named = base_facts(base)
    made = model.peft_config["default"]
    config, heads = _plain(made.to_dict()), list(getattr(made, "modules_to_save", None) or ())
    norms = {path: value for path, value in trained_norms(base).items() if not _inside(path, heads)}
    if norms:
        tensors |= {f"{PREFIX}{path}": value for path, value in norms.items()}
        config["modules_to_save"] = [*heads, *_modules(norms)]
    task_type = "SEQ_CLS" if heads else "CAUSAL_LM"
    config |= {"base_model_name_or_path": named["base_model"], "task_type": task_type, "inference_mode": True}
    facts = {
        **fingerprints(base),
        **named,
        "base_weights": weight_digests(base),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        **({"norm_scales": sum(value.numel() for value in norms.values() if value.requires_grad)} if norms else {}),
    }
    base_config = base.config.to_dict() if heads else None
    written = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    return write_adapter(folder, written, config, {**details, **facts}, base_config=base_config, overwrite=overwrite)


def check_norm_names(model: nn.Module) -> None:
    """Refuse a model whose norms PEFT cannot tell from other modules: it finds `modules_to_save` by the ends of names.

    Raises:
        InputError: the name of another module ends with that of a norm.
    """
    norms = _modules(base_parameters(model))
    other = next((name for name, _ in model.named_modules() if name not in norms and name.endswith(tuple(norms))), None)
    if other:
        raise InputError(
            f"PEFT would take the module {other} for a norm of this model, whose name it ends with; use a method that "
            "trains norm scales or an adapter, not both"
        )


def merged_with_peft(model: nn.Module, adapter: Adapter) -> CausalLM:
    """A copy of the model with the adapter merged into its weights, in the model's own dtype.

    Raises:
        InputError: the adapter belongs to another base, or is a soft prompt.
    """
    refuse_soft_prompt(adapter)
    from peft import PeftConfig, PeftModel

    check_base(model, adapter)
    model = copy.deepcopy(model)
    config = PeftConfig.from_pretrained(adapter.folder)
    norms = without_norms(config, model, adapter)
    put_norms(model, norms)
    if adapter.labels:
        ReplacedHead(model, adapter.labels)
    with fitting(adapter), without_deprecations():
        opened = PeftModel.from_pretrained(model, adapter.folder, config=config)
    check_tensors(opened, adapter, norms)
    return opened.eval().merge_and_unload()


def refuse_soft_prompt(adapter: Adapter) -> None:
    """Raise `InputError` for an adapter that has no place in the weights."""
    if adapter.kind == "PROMPT_TUNING":
        raise InputError(
            f"{adapter.folder} holds a soft prompt, which is an input and cannot be merged into weights; use it with "
            "`ofa predict` or PEFT"
        )


def without_norms(config: PeftConfig, model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Take the norms out of the modules that PEFT would copy; their scales and shifts in the adapter, by path.

    Raises:
        InputError: the model has no such norm, or one of another width.
    """
    saved = getattr(config, "modules_to_save", None) or ()
    heads = head_modules(model) if adapter.labels else ()
    norms = [module for module in saved if module not in heads]
    if not norms:
        return {}
    own = base_parameters(model)
    if strange := [module for module in norms if f"{module}.weight" not in own]:
        raise _of_another_base(adapter, f"{strange[0]} is none of its norms")
    values = {}
    for path in (path for path in own if path.rpartition(".")[0] in norms):
        value = adapter.parameters.get(f"{PREFIX}{path}")
        if value is None or value.shape != own[path].shape:
            raise _of_another_base(adapter, f"{path} has another width or is missing")
        values[path] = value
    config.modules_to_save = list(heads) or None
    return values


@torch.no_grad()
def put_norms(model: nn.Module, norms: Mapping[str, Tensor]) -> None:
    """Overwrite norm scales and shifts."""
    for path, value in norms.items():
        model.get_parameter(path).copy_(value)


@contextmanager
def fitting(adapter: Adapter) -> Iterator[None]:
    """Say what does not fit where PEFT loads an adapter's tensors."""
    try:
        yield
    except (ValueError, RuntimeError, KeyError) as error:
        raise _of_another_base(adapter, first_sentence(error)) from error


def check_tensors(opened: CausalLM, adapter: Adapter, norms: Mapping[str, Tensor]) -> None:
    """Refuse an adapter with other tensors than the model has places for, besides its `norms`.

    PEFT only warns of tensors that the file lacks, and ignores those that have no place.
    """
    from peft import get_peft_model_state_dict

    # Without PEFT's wrapper the keys lack the path of the model in it.
    own, saved = (
        {key.removeprefix(PREFIX) for key in keys}
        for keys in (get_peft_model_state_dict(opened, save_embedding_layers=False), adapter.parameters)
    )
    if differing := own ^ (saved - norms.keys()):
        raise _of_another_base(adapter, f"{min(differing)} is in one of them only")


def _of_another_base(adapter: Adapter, reason: str) -> InputError:
    return InputError(
        f"{adapter.folder} holds a {KINDS[adapter.kind]} adapter of {adapter.base or 'another model'}, which does not "
        f"fit this model ({reason}); load that base instead"
    )


def _modules(paths: Iterable[str]) -> list[str]:
    """The modules of these parameters."""
    return list(dict.fromkeys(path.rpartition(".")[0] for path in paths))


def _inside(path: str, modules: Iterable[str]) -> bool:
    return any(path.startswith(f"{module}.") for module in modules)


def _plain(config: dict[str, object]) -> dict[str, object]:
    """The configuration as JSON values: PEFT keeps module names in sets."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
