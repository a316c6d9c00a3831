"""Attach a PEFT adapter to a model, and detach it without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from ofa.errors import InputError, first_sentence
from ofa.models.types import CausalLM

if TYPE_CHECKING:
    from peft import PeftConfig

_SET_BY_PEFT = ("prepare_inputs_for_generation", "generation_config", "_require_grads_hooks", "_require_grads_hook")


def attach_adapter(model: CausalLM, config: PeftConfig, seed: int, undo: ExitStack) -> CausalLM:
    """Inject the adapter and freeze everything else; `undo` restores all that PEFT replaces, sets and freezes.

    PEFT's own `unload` needs a complete adapter, which a failure may not leave, and restores only modules.
    """
    for parameter in model.parameters():
        undo.callback(parameter.requires_grad_, parameter.requires_grad)
    # PEFT draws initial values on the CPU; forking its generator keeps the global random state.
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        return _wrap(model, config, undo) if config.is_prompt_learning else _inject(model, config, undo)


@contextmanager
def without_deprecations() -> Iterator[None]:
    """PEFT still uses a property that transformers has deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def _inject(model: CausalLM, config: PeftConfig, undo: ExitStack) -> CausalLM:
    from peft import inject_adapter_in_model
    from peft.functional import cast_adapter_dtype

    # Not only the configured targets: PEFT shortens many of them to the ends of their names.
    undo.callback(_put_back, model, dict(model.named_modules(remove_duplicate=False)))
    _keep_attributes(model, ("peft_config",), undo)
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise InputError(
            f"PEFT cannot adapt this model by {config.peft_type.value}: {first_sentence(error)}"
        ) from error
    cast_adapter_dtype(model, "default")
    return model


def _wrap(model: CausalLM, config: PeftConfig, undo: ExitStack) -> CausalLM:
    from peft import get_peft_model

    for module in (model, *model.children()):
        _keep_attributes(module, _SET_BY_PEFT, undo)
    if hasattr(model.config, "pretraining_tp"):
        undo.callback(setattr, model.config, "pretraining_tp", model.config.pretraining_tp)
    hooks = getattr(model, "_require_grads_hooks", None)
    with without_deprecations():
        wrapped = get_peft_model(model, config)
    if getattr(model, "_require_grads_hooks", None) is not hooks:
        undo.callback(model.disable_input_require_grads)
    return wrapped


def _put_back(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Undo replacements of modules, outer ones first."""
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        if path and getattr(model.get_submodule(parent), name) is not module:
            setattr(model.get_submodule(parent), name, module)


def _keep_attributes(module: nn.Module, names: Iterable[str], undo: ExitStack) -> None:
    own = vars(module)
    for name in names:
        if name in own:
            undo.callback(own.__setitem__, name, own[name])
        else:
            undo.callback(own.pop, name, None)
