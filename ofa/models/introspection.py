"""What a loaded model accepts: arguments, window; and evaluation mode for a while."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: its tensors could never be used in training again, and hooks may keep some.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def accepted_arguments(model: PreTrainedModel) -> set[str]:
    """The arguments that a model's forward takes, through an adapter's wrapper; none where it rewrites the input."""
    adapter = getattr(model, "active_peft_config", None)
    if adapter is None:
        return set(inspect.signature(model.forward).parameters)
    # Prompt-learning adapters rewrite the input and the cache themselves; the others pass every argument through.
    return set() if adapter.is_prompt_learning else set(inspect.signature(model.get_base_model().forward).parameters)


def model_window(model: PreTrainedModel) -> int | None:
    """The number of positions `model` leaves for tokens of the input; None where it has no limit."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    adapter = getattr(model, "active_peft_config", None)
    return int(positions) - (getattr(adapter, "num_virtual_tokens", None) or 0)
