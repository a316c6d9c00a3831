"""Adds the penalty to the loss that a model computes itself, with the trainer's weight of that loss.

With gradient accumulation, trainers divide each pass's loss by the labels of the whole optimizer step; so is the
penalty, whose weights then add up to 1 over a step. Most trainers differentiate `loss`. TRL's SFTTrainer (1.15 and
newer) differentiates the mean of the labels' `log_probs`, so the penalty is subtracted from each of these. Any other
loss would train without the penalty, and the backward pass refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ofa.errors import InputError
from ofa.regularizers.sinks import packed_starts

_WAY_OUT = (
    "attach with into_loss=False and add reg.penalty() to the loss where it is computed, for transformers.Trainer in a "
    "subclass's compute_loss"
)


def add_penalty(model: nn.Module, kwargs: Mapping[str, object], output: Any, penalty: Tensor) -> object:
    """The model's output with the penalty in its loss.

    Args:
        model: the model that returned it.
        kwargs: the named arguments of the forward pass.
        output: a `ModelOutput` with a scalar `loss`, or a tuple that begins with it.
        penalty: a scalar.

    Raises:
        InputError: the forward pass computed no loss; or, in the backward pass, the trainer differentiates another loss
            of the model's other outputs.
    """
    loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise InputError(
            "into_loss=True needs a model that computes its own loss, but this forward pass returned none (label "
            f"smoothing, compute_loss_func and loss_type='dft' take the labels away); {_WAY_OUT}"
        )
    total = loss + penalty.to(loss.device) * _share_of_batch(model, kwargs)
    carriers = [total]
    if isinstance(output, tuple):
        output = (total, *output[1:])
    else:
        output["loss"] = total
        if all(isinstance(output.get(name), Tensor) for name in ("log_probs", "label_mask")):
            output["log_probs"] = _lowered(output["log_probs"], output["label_mask"], penalty)
            carriers.append(output["log_probs"])
    if not torch.compiler.is_compiling():
        _refuse_other_losses(carriers, output)
    return output


def _share_of_batch(model: nn.Module, kwargs: Mapping[str, Any]) -> Tensor | float:
    """The share of the optimizer step's labels in this forward pass; 1 without `num_items_in_batch`.

    Labels are counted as `Trainer` counts them: a causal loss does not use the first. In a step without labels (all
    answers were truncated) the share is 0, like the cross-entropy's gradient.
    """
    items, labels, shifted = kwargs.get("num_items_in_batch"), kwargs.get("labels"), kwargs.get("shift_labels")
    if items is None or (labels is None and shifted is None):
        return 1.0
    if shifted is None:
        shifted = labels[..., 1:] if _loss_shifts_labels(model) else labels  # type: ignore[index]
    at_least_one = items.clamp_min(1) if isinstance(items, Tensor) else max(items, 1)
    return torch.ne(shifted, -100).sum() / at_least_one  # type: ignore[arg-type]


def _loss_shifts_labels(model: nn.Module) -> bool:
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    return LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss


def _lowered(log_probs: Tensor, label_mask: Tensor, penalty: Tensor) -> Tensor:
    """Log-probabilities minus the penalty at the labels, so that a mean over labels contains their share of it.

    Valid only if all labels have the same weight, which a hook checks in their gradient: TRL's "dft" weighs each label
    by its probability.
    """
    lowered = log_probs - penalty.to(log_probs) * label_mask

    def check_weights(gradient: Tensor) -> None:
        # The gradient of a mean is constant, also if the trainer scales it.
        if not torch.allclose(gradient, gradient.reshape(-1)[:1], rtol=1e-4, atol=0.0, equal_nan=True):
            raise InputError(
                "into_loss=True needs a loss that weighs all labels equally, but this one does not (loss_type='dft' "
                f"weighs by probability); use loss_type='nll', or {_WAY_OUT}"
            )

    if lowered.requires_grad and not torch.compiler.is_compiling():
        lowered.register_hook(check_weights)
    return lowered


def _refuse_other_losses(carriers: list[Tensor], output: object) -> None:
    """Raise in the backward pass if other outputs get a gradient and none of the carriers of the penalty did.

    Carriers are computed from the other outputs, so their hooks run first.
    """
    reached: list[bool] = []
    for carrier in carriers:
        if carrier.requires_grad:
            carrier.register_hook(lambda gradient: reached.append(True))

    def check(gradient: Tensor) -> None:
        if not reached:
            raise InputError(
                "into_loss=True put the penalty into the model's own loss, but the trainer differentiates another loss "
                f"of the model's other outputs; {_WAY_OUT}"
            )

    for value in _tensors(output):
        if value.requires_grad and not any(value is carrier for carrier in carriers):
            value.register_hook(check)


def _tensors(output: Any) -> Iterator[Tensor]:
    values = output if isinstance(output, tuple) else output.values()
    return (value for value in values if isinstance(value, Tensor))


def refuse_packed(given: Mapping[str, object]) -> None:
    """Refuse a batch with several sequences in a row: J and H are defined per sequence and measured per row.

    Args:
        given: arguments of the forward pass, among others `position_ids`, int64 (B, T), which restart at every
            sequence; `attention_mask`, (B, T); `cu_seq_lens_q`, sequence lengths for flash attention.

    Raises:
        InputError: positions restart within a row, or lengths of sequences are given.
    """
    if torch.compiler.is_compiling():
        return
    starts = packed_starts(given)
    if given.get("cu_seq_lens_q") is not None or (starts is not None and bool(starts.any())):
        raise InputError(
            "a row of this batch is several packed sequences, but the regularizers measure one sequence per row; turn "
            "packing and padding_free off (padding is never measured), or call the model in torch.no_grad() to leave "
            "it unmeasured"
        )
