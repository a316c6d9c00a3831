"""Query a loaded model: its forward's arguments, its window, head and dropout; and evaluate it in eval mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ofa.models.types import CausalLM

_SOURCE = "ofa_source"


def note_source(model: nn.Module, source: str) -> None:
    """Note on a model where it was loaded from, for the adapters that are made with it; no configuration is changed."""
    setattr(model, _SOURCE, source)


def source_of(model: nn.Module) -> str | None:
    """Where a model was loaded from (see `ofa.models.load.Source`); None if it was not loaded by `load_model`."""
    return getattr(model, _SOURCE, None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module's training mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: hooks may keep its tensors, which autograd could not use later.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Every parameter frozen; afterwards each one's flag is restored."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[..., object]) -> Iterator[None]:
    """A forward hook on each module."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def accepted_arguments(model: CausalLM) -> set[str]:
    """The arguments of a model's forward, seen through a PEFT wrapper; empty if the wrapper rewrites the input."""
    adapter = getattr(model, "active_peft_config", None)
    if adapter is None:
        return set(inspect.signature(model.forward).parameters)
    # Prompt-learning adapters rewrite the input and the cache; the others pass all arguments on.
    return set() if adapter.is_prompt_learning else set(inspect.signature(model.get_base_model().forward).parameters)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def model_window(model: CausalLM) -> int | None:
    """The number of positions for input tokens, without virtual tokens; None if the model has no limit."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    adapter = getattr(model, "active_peft_config", None)
    return int(positions) - (getattr(adapter, "num_virtual_tokens", None) or 0)


def dropouts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with a dropout rate in training mode, also 0, since rates may change later."""
    return [(path, module) for path, module in model.named_modules() if dropout_rates(module)]


def dropout_rates(module: nn.Module) -> list[float]:
    """The rate of an `nn.Dropout`, and rates that a module stores for `F.dropout`."""
    own = [float(module.p)] if isinstance(module, nn.modules.dropout._DropoutNd) else []
    return own + [value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]


def active_dropout(found: Iterable[tuple[str, nn.Module]]) -> str | None:
    """The path of the first of `dropouts` that drops anything now, or None."""
    return next((path for path, module in found if module.training and max(dropout_rates(module)) > 0), None)


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules after a classifier's last layer: a pooler, and what is outside of the base model.

    Empty for a model that has a vocabulary as its output.
    """
    base: Any = getattr(model, "base_model", model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if base is model or output is not None:
        return ()
    found = [
        name for name, child in model.named_children() if child is not base and any(True for _ in child.parameters())
    ]
    pooler = isinstance(getattr(base, "pooler", None), nn.Module)
    return (*([f"{model.base_model_prefix}.pooler"] if pooler else []), *found)
