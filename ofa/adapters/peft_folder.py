"""Adapters of PEFT's other methods (LoRA, IA3, a soft prompt): save, open and merge them by PEFT's own means."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from ofa.adapters.base_norms import fingerprints
from ofa.adapters.base_weights import weight_digests
from ofa.adapters.folder import KINDS
from ofa.adapters.read import PREFIX, Adapter
from ofa.adapters.same_base import base_facts, check_base
from ofa.adapters.write import write_adapter
from ofa.errors import InputError, first_sentence
from ofa.models.types import CausalLM
from ofa.tuning.heads import ReplacedHead


def save_peft_adapter(
    model: CausalLM, folder: str | Path, *, details: dict[str, object], overwrite: bool = False
) -> Path:
    """Write the adapter "default" of a model as PEFT does, with `ofa_config.json` and a model card beside it.

    Raises:
        InputError: a parameter is not finite, or the folder cannot be written or is not empty.
    """
    from peft import PeftModel, get_peft_model_state_dict

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # Embeddings are never trained here; PEFT's check for it would ask the hub.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    # Without PEFT's wrapper the keys lack the path of the model in it.
    prefix = "" if base is not model else PREFIX
    tensors = {f"{prefix}{key}": value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    named = base_facts(base)
    config = _plain(model.peft_config["default"].to_dict())
    has_head = bool(config.get("modules_to_save"))
    task_type = "SEQ_CLS" if has_head else "CAUSAL_LM"
    config |= {"base_model_name_or_path": named["base_model"], "task_type": task_type, "inference_mode": True}
    facts = {
        **fingerprints(base),
        **named,
        "base_weights": weight_digests(base),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
    }
    base_config = base.config.to_dict() if has_head else None
    return write_adapter(folder, tensors, config, {**details, **facts}, base_config=base_config, overwrite=overwrite)


def open_peft_adapter(model: nn.Module, adapter: Adapter) -> CausalLM:
    """Put an adapter into a base model, which is modified.

    Returns:
        PEFT's wrapper of the model.

    Raises:
        InputError: the adapter belongs to another base.
    """
    from peft import PeftModel, get_peft_model_state_dict

    check_base(model, adapter)
    if adapter.labels:
        ReplacedHead(model, adapter.labels)
    try:
        opened = PeftModel.from_pretrained(model, adapter.folder)
    except (ValueError, RuntimeError, KeyError) as error:
        raise _of_another_base(adapter, first_sentence(error)) from error
    # PEFT only warns of parameters that the file lacks, and ignores those that have no place.
    own = get_peft_model_state_dict(opened, save_embedding_layers=False).keys()
    if differing := own ^ adapter.parameters.keys():
        raise _of_another_base(adapter, f"{min(differing)} is in one of them only")
    return opened.eval()


def merged_with_peft(model: nn.Module, adapter: Adapter) -> CausalLM:
    """A copy of the model with the adapter merged into its weights.

    Raises:
        InputError: the adapter belongs to another base, or is a soft prompt.
    """
    refuse_soft_prompt(adapter)
    return open_peft_adapter(copy.deepcopy(model), adapter).merge_and_unload()


def refuse_soft_prompt(adapter: Adapter) -> None:
    """Raise `InputError` for an adapter that has no place in the weights."""
    if adapter.kind == "PROMPT_TUNING":
        raise InputError(
            f"{adapter.folder} holds a soft prompt, which is an input and cannot be merged into weights; use it with "
            "`ofa predict` or PEFT"
        )


def _of_another_base(adapter: Adapter, reason: str) -> InputError:
    return InputError(
        f"{adapter.folder} holds a {KINDS[adapter.kind]} adapter of {adapter.base or 'another model'}, which does not "
        f"fit this model ({reason}); load that base instead"
    )


def _plain(config: dict[str, object]) -> dict[str, object]:
    """The configuration as JSON values: PEFT keeps module names in sets."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
