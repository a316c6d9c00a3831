"""Pad batches to a few lengths, so that shapes repeat and a step captured for one of them serves many batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 16
"""Every bucket is a multiple of this, for which the kernels of the curvature are compiled ahead of time."""

IGNORED = -100
"""The label that a cross-entropy leaves out."""

_FILL = {"labels": IGNORED}
"""What padding holds, where it is not 0."""


def bucket(length: int, window: int | None = None) -> int:
    """The smallest bucket of at least `length` tokens: multiples of 16 up to 128, then four per octave.

    Args:
        window: the most tokens that the model takes.
    """
    step = TILE
    while length > 8 * step:
        step *= 2
    rounded = -(-length // step) * step
    return rounded if window is None else max(length, min(rounded, window))


def padded(batch: Mapping[str, Any], window: int | None = None) -> dict[str, Any]:
    """The batch with its sequences padded on the right to their bucket, and a mask exactly where it is needed.

    Padded are the tensors that begin with (sequences, tokens). A mask that is known to be of ones, because it is in the
    host's memory, is left out; one on a device is kept, since reading it would wait.
    """
    tokens = next((batch[name] for name in ("input_ids", "inputs_embeds") if batch.get(name) is not None), None)
    mask = batch.get("attention_mask")
    if tokens is None or (mask is not None and mask.shape != tokens.shape[:2]):
        return dict(batch)
    shape = tokens.shape[:2]
    missing = bucket(shape[1], window) - shape[1]
    if mask is None:
        mask = torch.ones(shape, dtype=torch.long, device=tokens.device) if missing else None
    elif not missing and not mask.is_cuda and bool(mask.all()):
        mask = None
    others = {name: value for name, value in batch.items() if name != "attention_mask"}
    whole = others if mask is None else {**others, "attention_mask": mask}
    return {
        name: _stretched(value, missing, _FILL.get(name, 0))
        if isinstance(value, Tensor) and value.shape[:2] == shape
        else value
        for name, value in whole.items()
    }


def _stretched(tensor: Tensor, missing: int, fill: int) -> Tensor:
    if not missing:
        return tensor
    return F.pad(tensor, [0, 0] * (tensor.dim() - 2) + [0, missing], value=fill)
