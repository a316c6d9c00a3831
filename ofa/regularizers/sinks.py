"""The tokens that count for the step ratio: all, the last one, or all but attention sinks.

A pretrained model writes massive activations into a few tokens, mostly the first, where heads attend that have nothing
to attend to (arXiv 2309.17453, 2402.17762). One branch writes an update there that is 150 times as long as those of the
other tokens, and a later one removes it: over all tokens, these two steps are most of the step ratio.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

LONGEST = 10.0
"""A token is a sink if one of its steps is this many times as long as the median of its row."""


def counted_tokens(tokens: str, squared: Tensor, mask: Tensor | None, starts: Tensor | None) -> Tensor | None:
    """The tokens that count, bool (B, T), or None if all do.

    Args:
        tokens: "no-sinks", "all" or "last". A row of nothing but sinks keeps all its tokens.
        squared: squared lengths of the steps, (steps, B, T).
        mask: 1 at real tokens and 0 at padding, (B, T), or None if every token is real.
        starts: the first tokens of the second and later sequences of packed rows, bool, broadcast to (B, T), or None.
    """
    real = None if mask is None else mask.bool()
    if tokens == "all":
        return real
    if real is None:
        real = torch.ones_like(squared[0], dtype=torch.bool)
    order = real.cumsum(1)
    if tokens == "last":
        return real & (order == order[:, -1:])
    first = order == 1 if starts is None else (order == 1) | starts.to(real.device)
    known = squared.detach()
    median = known.masked_fill(~real, torch.nan).nanmedian(2, keepdim=True).values
    kept = real & ~first & ~(known > LONGEST**2 * median).any(0)
    return torch.where(kept.any(1, keepdim=True), kept, real)


def packed_starts(given: Mapping[str, object]) -> Tensor | None:
    """Where a packed row begins another sequence, bool (B, T), from the arguments of a forward pass; None if unknown.

    Args:
        given: among others `position_ids`, int64 (B, T), which restart at every sequence, and `attention_mask`, (B, T).
    """
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return None
    restarts = positions[:, 1:] <= positions[:, :-1]
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        restarts = restarts & mask[:, 1:].bool() & mask[:, :-1].bool()
    return F.pad(restarts, (1, 0))
