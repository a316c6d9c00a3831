"""Moments of the attention weights that the trace of attention is made of; derived in docs/theory.md."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ofa_kernels.reference.stream import widen


def attention_moments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    angle: Tensor,
    turn: Tensor,
    aim: Tensor,
    tangent: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of the scores, the mean of a bilinear form, and the covariance of scores and values, per query.

        a_ij = softmax_j(scale q_i·k_j + mask_ij)
        lse_i = log Σ_j exp(scale q_i·k_j + mask_ij)
        mean_i = Σ_j a_ij (angle_i·turn_j − aim_i·k_j)
        covariance_i = Σ_j a_ij (scale t_i·k_j) (v_j − o_i),   t = tangent, or q without one

    o_i enters as an input of its own: for the attention output Σ_j a_ij v_j the last line is a covariance. Queries that
    may attend to nothing have lse = −inf, mean 0 and covariance 0.

    Args:
        query: q, (B, H, T, d), floating point, as they enter the scores (rotated).
        key: k, (B, K, S, d); each serves H/K consecutive heads.
        value: v, (B, K, S, e).
        output: o, (B, H, T, e).
        angle: (B or 1, T, c), the same for all heads, not differentiated.
        turn: (B, H, S, c).
        aim: (B, H, T, d).
        tangent: t, (B, H, T, d), or None for q.
        mask: bool (True: attends) or added to the scores, broadcast against (B, H, T, S); not differentiated.
        causal: query i attends to keys up to i; for T = S.
        window: a query attends to the last `window` keys at most, itself included; also on the other side of it if not
            `causal`.

    Returns:
        lse and mean, (B, H, T), float32; covariance, (B, H, T, e), in the dtype of `query`.

    Raises:
        ValueError: shapes that do not match.
    """
    check_attention(query, key, value, output, angle, turn, aim, tangent, window)
    q, k, v, o = (widen(x) for x in (query, key, value, output))
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    transposed = k.transpose(-1, -2)
    raw = scale * (q @ transposed)
    scores = raw + bias(mask, q.shape[-2], k.shape[-2], causal, window, raw)
    attends = (scores > -torch.inf).any(-1, keepdim=True)
    scores = torch.where(attends, scores, 0.0)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.unsqueeze(-1)) * attends
    moved = raw if tangent is None else scale * (widen(tangent) @ transposed)
    form = widen(angle).unsqueeze(1) @ widen(turn).transpose(-1, -2) - widen(aim) @ transposed
    mean = (weights * form).sum(-1)
    weighted = weights * moved
    covariance = weighted @ v - weighted.sum(-1, keepdim=True) * o
    return lse.masked_fill(~attends.squeeze(-1), -torch.inf), mean, covariance.to(query.dtype)


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    angle: Tensor,
    turn: Tensor,
    aim: Tensor,
    tangent: Tensor | None,
    window: int | None = None,
) -> None:
    """Refuse, with a ValueError, tensors that are no attention together."""
    check_heads(query, key, value, output)
    (sequences, heads, rows, width), columns, features = query.shape, key.shape[2], angle.shape[-1]
    expected = {
        "angle": (angle, (sequences if angle.shape[0] != 1 else 1, rows, features)),
        "turn": (turn, (sequences, heads, columns, features)),
        "aim": (aim, (sequences, heads, rows, width)),
        "tangent": (tangent, (sequences, heads, rows, width)),
    }
    check_shapes(expected)
    check_window(window)


def check_window(window: int | None) -> None:
    """Refuse, with a ValueError, a window without even the query's own key."""
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} keys leaves queries nothing to attend to; it counts their own")


def check_heads(query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
    """Refuse, with a ValueError, queries, keys, values and outputs that are no attention together."""
    if query.dim() != 4 or key.dim() != 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} are not (B, H, T, d) and (B, K, S, d)")
    (sequences, heads, rows, _), (_, shared, columns, _) = query.shape, key.shape
    if shared == 0 or heads % shared:
        raise ValueError(f"{heads} query heads cannot share {shared} key heads evenly")
    depth = value.shape[-1]
    expected = {
        "value": (value, (sequences, shared, columns, depth)),
        "output": (output, (sequences, heads, rows, depth)),
    }
    check_shapes(expected)


def check_shapes(expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Refuse, with a ValueError, the first tensor that has not the shape beside it."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} should be {shape}")


def bias(
    mask: Tensor | None, rows: int, columns: int, causal: bool, window: int | None, like: Tensor, first: int = 0
) -> Tensor:
    """What is added to the scores of queries first…first+rows: 0 or a float mask's value, −inf where none attends."""
    query = torch.arange(first, first + rows, device=like.device).unsqueeze(1)
    key = torch.arange(columns, device=like.device).unsqueeze(0)
    attends = torch.ones((rows, columns), dtype=torch.bool, device=like.device)
    if causal:
        attends &= key <= query
    if window is not None:
        attends &= key > query - window
        if not causal:
            attends &= key < query + window
    added = torch.zeros((), dtype=like.dtype, device=like.device)
    if mask is not None and mask.dtype == torch.bool:
        attends = attends & mask
    elif mask is not None:
        added = mask.to(like.dtype)
    return torch.where(attends, added, -torch.inf)
