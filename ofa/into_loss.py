"""Adds the penalty to the loss that a model computes itself, weighed as the caller weighs that loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ofa.errors import InputError


def add_penalty(model: nn.Module, kwargs: Mapping[str, Any], output: Any, penalty: Tensor) -> Any:
    """The model's output with the penalty in its loss.

    Args:
        model: whose forward pass it was.
        kwargs: the named arguments of that pass.
        output: a `ModelOutput` with a scalar `loss`, or a tuple that begins with it.
        penalty: a scalar.

    Raises:
        InputError: the forward pass computed no loss.
    """
    loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
    if loss is None or loss.dim() != 0:
        raise InputError(
            "into_loss=True needs a model that computes its own loss, but this forward pass returned none "
            "(label smoothing and compute_loss_func take the labels away); add reg.penalty() to the loss yourself"
        )
    total = loss + penalty.to(loss.device) * _share_of_batch(model, kwargs)
    if isinstance(output, tuple):
        return (total, *output[1:])
    output["loss"] = total
    return output


def _share_of_batch(model: nn.Module, kwargs: Mapping[str, Any]) -> Tensor | float:
    """Part of the optimizer step's labels in this forward pass; 1 when the caller does not say.

    `Trainer` divides the summed loss by the labels of the whole accumulated batch; the penalty must be divided alike
    to count once per optimizer step. Labels are counted as it counts them: a causal loss never uses the first.
    """
    items, labels, shifted = kwargs.get("num_items_in_batch"), kwargs.get("labels"), kwargs.get("shift_labels")
    if items is None or (labels is None and shifted is None):
        return 1.0
    if shifted is None:
        shifted = labels[..., 1:] if _loss_shifts_labels(model) else labels  # type: ignore[index]
    return torch.ne(shifted, -100).sum() / items  # type: ignore[arg-type]


def _loss_shifts_labels(model: nn.Module) -> bool:
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    return LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
