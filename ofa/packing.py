"""Rows that hold several sequences: what they look like to a model, and that they are not measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ofa.errors import InputError


def refuse_packed(given: Mapping[str, Any]) -> None:
    """Refuse a batch whose rows are several sequences, from the arguments of a forward pass.

    J is a ratio of lengths over one sequence and H a mean over sequences, both measured per row, so that packed rows
    would be another objective. Padding costs no accuracy: it is never measured.

    Args:
        given: among others `position_ids`, int64 (B, T), which start again at every sequence; `attention_mask`, (B, T);
            `cu_seq_lens_q`, which collators without padding hand to flash attention.

    Raises:
        InputError: positions start again within a row, or lengths of sequences are given.
    """
    if torch.compiler.is_compiling():
        return
    if given.get("cu_seq_lens_q") is not None or _positions_restart(given):
        raise InputError(
            "a row of this batch is several packed sequences, but the regularizers measure one sequence per row; turn "
            "packing and padding_free off (padding is never measured), or call the model in torch.no_grad() to leave "
            "it unmeasured"
        )


def _positions_restart(given: Mapping[str, Any]) -> bool:
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return False
    restarts = positions[:, 1:] <= positions[:, :-1]
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        restarts = restarts & mask[:, 1:].bool() & mask[:, :-1].bool()
    return bool(restarts.any())
