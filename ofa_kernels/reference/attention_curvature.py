"""Token sums of the own-token Jacobian of an attention, (C, K, ā) of every query head; derived in docs/theory.md.

With a the softmax's weights, κ the slope of a soft-cap (else 1), R_i the rotation of the rotary embedding, s the scale,
w the tokens' weights, and σ_q, σ_k of norms on the heads (else 1, without the second terms):

    ā = Σ_i w_i a_ii
    C = s Σ_i (w_i/σ_q,i) Σ_j a_ij κ_ij (v_j − o_i)(Γ_q R_iᵀk_j)ᵀ  −  Σ_i (w_i/σ_q,i) r_i q̂_iᵀ/d
        with r_i = Σ_j a_ij κ_ij s (q_i·k_j)(v_j − o_i)
    K = s Σ_i (w_i/σ_k,i) a_ii κ_ii (v_i − o_i) [ Γ_k R_iᵀq_i − (q_i·k_i) k̂_i/d ]ᵀ

and Σ_i w_i A_i = Σ_h W_o (ā W_v + C W_q + K W_k). The scores are never stored as one matrix: R_i mixes channels in
pairs, so Σ_i w_i a_ij R_iᵀk_j needs only the sums of w_i a_ij cos θ_i and w_i a_ij sin θ_i over the queries of a key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ofa_kernels.reference.attention_heads import (
    Attends,
    HeadNorm,
    Rotary,
    check_heads,
    check_shapes,
    check_window,
    per_query_head,
)
from ofa_kernels.reference.stream import thin_product, upcast

BLOCK = 1 << 20
"""Scores in memory at a time: 4 MB in float32."""


@dataclass(frozen=True)
class Move:
    """A direction of every token's own query, key and value, with values and outputs projected onto m rows.

    Attributes:
        query: δq, (B, H, T, d), or None for q itself.
        key: δk, (B, K, T, d), or None for k itself.
        value: δv, projected, (B, H or K, T, m).
        read_value, read_output: v and o, projected, (B, H or K, T, m) and (B, H, T, m).
    """

    query: Tensor | None
    key: Tensor | None
    value: Tensor
    read_value: Tensor
    read_output: Tensor


class AttentionSums(NamedTuple):
    """What `attention_curvature` returns; see the module's docstring.

    Attributes:
        query, key: C and K, (B, H, e, d). For a norm over all heads together, without the second terms.
        value: ā, (B, H).
        query_pull, key_pull: for norms over all heads together, w_i r_i/σ_q,i and w_i s a_ii κ_ii (q_i·k_i)(v_i − o_i)
            /σ_k,i, (B, H, T, e), the factors of q̂_i/width and k̂_i/width in the second terms; else None.
        moved: δo_i along the `Move`, projected, (B, H, T, m); None without one.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_pull: Tensor | None
    key_pull: Tensor | None
    moved: Tensor | None


def attention_curvature(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    weights: Tensor,
    attends: Attends,
    *,
    rotary: Rotary | None = None,
    query_norm: HeadNorm | None = None,
    key_norm: HeadNorm | None = None,
    move: Move | None = None,
) -> AttentionSums:
    """(C, K, ā) of every query head and sequence, and how the outputs change along a direction.

        δo_i = Σ_j a_ij κ_ij s (δq_i·k_j)(v_j − o_i) + a_ii ( κ_ii s (q_i·δk_i)(v_i − o_i) + δv_i )

    Args:
        query: q, (B, H, T, d), as they enter the scores: normalized and rotated if the model does that.
        key: k, (B, K, T, d), as they enter the scores; each serves H/K consecutive heads.
        value: v, (B, K, T, e).
        output: o = Σ_j a_ij v_j, (B, H, T, e).
        weights: w, (B, T); 0 at padding.
        attends: scale, mask, window, soft-cap, sinks.
        rotary, query_norm, key_norm: R, and the norms of the heads; None where there is none.
        move: the direction, or None.

    Returns:
        `AttentionSums`, in float32 or wider. Differentiable in every tensor.

    Raises:
        ValueError: shapes that do not match.

    Example:
        >>> query, key, value = torch.randn(3, 1, 2, 5, 4)  # one sequence, two heads, five tokens
        >>> attends = ofa_kernels.reference.Attends(scale=0.5, causal=True)
        >>> output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5)
        >>> sums = ofa_kernels.attention_curvature(query, key, value, output, torch.full((1, 5), 0.2), attends)
        >>> sums.query.shape, sums.key.shape, sums.value.shape
        (torch.Size([1, 2, 4, 4]), torch.Size([1, 2, 4, 4]), torch.Size([1, 2]))
    """
    check_heads(query, key, value, output)
    check_window(attends.window)
    (sequences, heads, tokens, _), shared = query.shape, key.shape[1]
    check_shapes({"weights": (weights, (sequences, tokens))})
    q, k, v, o = (upcast(x).contiguous() for x in (query, key, value, output))
    w = upcast(weights).unsqueeze(1)
    query_weights = attends.scale * (w if query_norm is None else w * query_norm.hat()[1].squeeze(-1))
    angles = _angles(query_weights, rotary, q)
    alpha = angles.new_zeros(0)
    mean_keys, own, pulls, moves = [], [], [], []
    for rows, columns, raw, a, slope in score_blocks(q, k, attends):
        keys, size = k[:, :, columns], raw.shape[2]
        mean_keys.append(_mix(slope, keys))
        spread = slope.mT @ angles[:, :, rows].expand(-1, heads, -1, -1)
        alpha = spread if size == tokens else _added(alpha, spread, columns, tokens)
        offset = rows.start - columns.start
        own.append(torch.stack([x.diagonal(offset, -2, -1)[..., :size] for x in (a, slope, raw)]))
        if query_norm is not None:
            pulls.append(_covariance(slope * raw, v[:, :, columns], o[:, :, rows]))
        if move is not None:
            scores = raw
            if move.query is not None:
                scores = _scores(attends.scale * upcast(move.query)[:, :, rows], keys)
            read = upcast(move.read_value)[:, :, columns], upcast(move.read_output)[:, :, rows]
            moves.append(_covariance(slope * scores, *read))
    weight, own_slope, own_score = _joined(own, -1).unbind()
    values = per_query_head(v, heads)
    first = _turned_back(k, alpha, rotary)
    query_sum = _outer(o, _turned_back(_joined(mean_keys, 2), angles, rotary), _outer(values, first))
    turned = q if rotary is None else rotary.turn(q, -1.0)
    gap, key_weights = values - o, w * own_slope
    query_pull = key_pull = None
    if query_norm is not None:
        query_sum = query_sum * upcast(query_norm.weight)
        query_pull = _joined(pulls, 2) * (query_weights / attends.scale).unsqueeze(-1)
        if not query_norm.joint:
            query_sum = query_sum - query_pull.mT @ query_norm.hat()[0] / query_norm.width
            query_pull = None
    if key_norm is not None:
        hat, rstd = key_norm.hat()
        key_weights = key_weights * per_query_head(rstd.expand(-1, shared, -1, -1), heads).squeeze(-1)
        turned = turned * per_query_head(upcast(key_norm.weight).expand(1, shared, 1, -1), heads)
    key_sum = _outer(gap * (attends.scale * key_weights).unsqueeze(-1), turned)
    if key_norm is not None:
        key_pull = gap * (own_score * key_weights).unsqueeze(-1)
        if not key_norm.joint:
            key_sum = key_sum - key_pull.mT @ per_query_head(hat, heads) / key_norm.width
            key_pull = None
    moved = None
    if move is not None:
        if move.key is not None:
            own_score = attends.scale * (q * per_query_head(upcast(move.key), heads)).sum(-1)
        moved = _joined(moves, 2) + _own_move(move, weight, own_slope * own_score)
    return AttentionSums(query_sum, key_sum, (w * weight).sum(-1), query_pull, key_pull, moved)


def attention_adjoint(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    pulled: Tensor,
    attends: Attends,
) -> tuple[Tensor, Tensor, Tensor]:
    """The own-token backward pass of an attention: gradients in q_i, k_i and v_i from t_i, the gradient in o_i.

        b_ij = s a_ij κ_ij t_i·(v_j − o_i):    q_i: Σ_j b_ij k_j,    k_i: b_ii q_i,    v_i: a_ii t_i

    Args:
        query, key, value, output, attends: as for `attention_curvature`.
        pulled: t, (B, H, T, e).

    Returns:
        Three tensors per query head, (B, H, T, d) twice and (B, H, T, e).
    """
    q, k, v, o, t = (upcast(x) for x in (query, key, value, output, pulled))
    to_query, own = [], []
    for rows, columns, raw, a, slope in score_blocks(q, k, attends):
        along = _scores(t[:, :, rows], v[:, :, columns]) - (t[:, :, rows] * o[:, :, rows]).sum(-1, keepdim=True)
        b = attends.scale * slope * along
        to_query.append(_mix(b, k[:, :, columns]))
        offset, size = rows.start - columns.start, raw.shape[2]
        own.append(torch.stack([x.diagonal(offset, -2, -1)[..., :size] for x in (a, b)]))
    weight, own_b = torch.cat(own, -1).unsqueeze(-1).unbind()
    return torch.cat(to_query, 2), own_b * q, weight * t


def score_blocks(q: Tensor, k: Tensor, attends: Attends) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """Blocks of queries with the keys that they may attend to.

    Yields the two ranges, the scores s q_i·k_j, the weights a_ij, and a_ij κ_ij: (B, H, rows, columns) each.
    """
    sequences, heads, tokens, _ = q.shape
    size = max(16, BLOCK // (sequences * heads * tokens))
    scaled = attends.scale * k
    # A soft-cap would bound the masked scores.
    only_causal = attends.causal and attends.mask is None and attends.window is None and attends.softcap is None
    for start in range(0, tokens, size):
        rows = slice(start, min(start + size, tokens))
        columns = slice(*attends.keys(rows.start, rows.stop, tokens))
        raw = _scores(q[:, :, rows], scaled[:, :, columns])
        if only_causal:
            count = rows.stop - rows.start
            raw[..., rows] += raw.new_full((count, count), _never(raw.dtype)).triu(1)
        capped, kappa = raw, None
        if attends.softcap is not None:
            tanh = torch.tanh(raw / attends.softcap)
            capped, kappa = attends.softcap * tanh, 1 - tanh.square()
        a = _softmax(capped, None if only_causal else attends.bias(rows, columns, raw), attends)
        yield rows, columns, raw, a, a if kappa is None else a * kappa


def _softmax(scores: Tensor, bias: Tensor | None, attends: Attends) -> Tensor:
    if bias is not None:
        scores = scores + bias.clamp(min=_never(bias.dtype))
    if attends.sinks is not None:
        total = torch.logsumexp(scores, -1, keepdim=True)
        return torch.exp(scores - torch.logaddexp(total, upcast(attends.sinks).view(1, -1, 1, 1)))
    a = torch.softmax(scores, -1)
    # Queries without keys, as at padding, have weights of 0.
    return a if attends.mask is None or bias is None else a * (bias > -torch.inf).any(-1, keepdim=True)


def _never(dtype: torch.dtype) -> float:
    """Added to scores of keys that a query may not attend to: their weight is 0, and so is their product with it.

    Half of float16's range, so that the sum is finite too.
    """
    return max(-1e20, torch.finfo(dtype).min / 2)


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """q_i·k_j of heads that share keys: (B, H, n, d) and (B, K, m, d) → (B, H, n, m)."""
    return (_grouped(queries, keys) @ keys.mT).view(*queries.shape[:3], keys.shape[2])


def _mix(weights: Tensor, rows: Tensor) -> Tensor:
    """Σ_j weights_ij row_j of heads that may share rows: (B, H, n, m) and (B, K, m, c) → (B, H, n, c)."""
    return thin_product(_grouped(weights, rows), rows).reshape(*weights.shape[:3], rows.shape[-1])


def _grouped(queries: Tensor, keys: Tensor) -> Tensor:
    """All queries of a key head in one matrix: (B, K, H/K · n, ·)."""
    return queries.reshape(len(queries), keys.shape[1], -1, queries.shape[-1])


def _covariance(products: Tensor, values: Tensor, outputs: Tensor) -> Tensor:
    """Σ_j products_ij (v_j − o_i)."""
    return _mix(products, values) - products.sum(-1, keepdim=True) * outputs


def _outer(left: Tensor, right: Tensor, less: Tensor | None = None) -> Tensor:
    """Σ_i left_i right_iᵀ of every head, (B, H, T, e) and (B, H, T, d) → (B, H, e, d), or `less` minus that."""
    flat = left.flatten(0, 1).mT, right.flatten(0, 1)
    product = torch.bmm(*flat) if less is None else torch.baddbmm(less.flatten(0, 1), *flat, alpha=-1)
    return product.unflatten(0, left.shape[:2])


def _angles(weights: Tensor, rotary: Rotary | None, heads: Tensor) -> Tensor:
    """w_i cos θ_i, w_i sin θ_i and, for channels that are not rotated, w_i: (B, 1 or H, T, ·)."""
    column = weights.unsqueeze(-1)
    if rotary is None:
        return column
    turned = torch.cat((upcast(rotary.cos), upcast(rotary.sin)), -1).unsqueeze(1) * column
    unturned = heads.shape[-1] > 2 * rotary.cos.shape[-1]
    return torch.cat((turned, column), -1) if unturned else turned


def _turned_back(heads: Tensor, angles: Tensor, rotary: Rotary | None) -> Tensor:
    """R_iᵀ of keys or query heads, (B, K or H, T, d), with factors in place of its cos, sin and 1: (B, H, T, d)."""
    shared = heads.shape[1]
    angles = angles.unflatten(1, (shared, -1)) if angles.shape[1] > 1 else angles.unsqueeze(1)
    if rotary is None:
        return (heads.unsqueeze(2) * angles).flatten(1, 2)
    count = rotary.cos.shape[-1]
    cos, sin, rest = angles[..., :count], angles[..., count : 2 * count], angles[..., 2 * count :]
    return rotary.mix(heads.unsqueeze(2), cos, sin, rest, -1.0).flatten(1, 2)


def _own_move(move: Move, weight: Tensor, slope: Tensor) -> Tensor:
    """The terms of the token's own key and value in δo_i."""
    heads = weight.shape[1]
    gap = per_query_head(upcast(move.read_value), heads) - upcast(move.read_output)
    return slope.unsqueeze(-1) * gap + weight.unsqueeze(-1) * per_query_head(upcast(move.value), heads)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _added(total: Tensor, part: Tensor, columns: slice, tokens: int) -> Tensor:
    """The sum of parts at ranges of the tokens, (B, H, T, ·); `total` is empty before the first."""
    if not total.numel():
        total = part.new_zeros(*part.shape[:2], tokens, part.shape[-1])
    total[:, :, columns] += part
    return total
