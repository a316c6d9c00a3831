"""Query a loaded model: its forward's arguments, its window; and evaluate it in eval mode."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

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


def accepted_arguments(model: CausalLM) -> set[str]:
    """The arguments of a model's forward, seen through a PEFT wrapper; empty if the wrapper rewrites the input."""
    adapter = getattr(model, "active_peft_config", None)
    if adapter is None:
        return set(inspect.signature(model.forward).parameters)
    # Prompt-learning adapters rewrite the input and the cache; the others pass all arguments on.
    return set() if adapter.is_prompt_learning else set(inspect.signature(model.get_base_model().forward).parameters)


def model_window(model: CausalLM) -> int | None:
    """The number of positions for input tokens, without virtual tokens; None if the model has no limit."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    adapter = getattr(model, "active_peft_config", None)
    return int(positions) - (getattr(adapter, "num_virtual_tokens", None) or 0)
