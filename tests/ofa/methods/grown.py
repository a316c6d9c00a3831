"""Small models of every family that read the tiny tokenizer's ids."""

from __future__ import annotations

from typing import Any

import torch


def with_vocabulary_of(tokenizer: Any, model: Any) -> Any:
    """The model with one embedding per token of the tokenizer, all different."""
    model.resize_token_embeddings(len(tokenizer))
    generator = torch.Generator().manual_seed(1)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = module.weight
        weight.data = 0.15 * torch.randn(weight.shape, generator=generator).to(weight.device)
    return model
