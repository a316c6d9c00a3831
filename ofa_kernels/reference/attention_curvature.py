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
from ofa_kernels.reference.stream import upcast

BLOCK = 1 << 21
"""Scores in memory at a time: 8 MB in float32."""


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
    """
    check_heads(query, key, value, output)
    check_window(attends.window)
    (sequences, heads, tokens, _), shared = query.shape, key.shape[1]
    check_shapes({"weights": (weights, (sequences, tokens))})
    q, k, v, o = (upcast(x) for x in (query, key, value, output))
    values = per_query_head(v, heads)
    w = upcast(weights).unsqueeze(1)
    query_weights = attends.scale * (w if query_norm is None else w * query_norm.hat()[1].squeeze(-1))
    angles = _angles(query_weights, rotary, q)
    alpha = q.new_zeros(sequences, heads, tokens, angles.shape[-1])
    mean_keys, own, pulls, moves = [], [], [], []
    for rows, columns, raw, a, slope in score_blocks(q, k, attends):
        keys, size = k[:, :, columns], raw.shape[2]
        mean_keys.append(_mix(slope, keys))
        alpha[:, :, columns] += slope.mT @ angles[:, :, rows].expand(-1, heads, -1, -1)
        offset = rows.start - columns.start
        own.append(torch.stack([x.diagonal(offset, -2, -1)[..., :size] for x in (a, slope)]))
        if query_norm is not None:
            pulls.append(_covariance(slope * raw, v[:, :, columns], o[:, :, rows]))
        if move is not None:
            scores = raw
            if move.query is not None:
                scores = _scores(attends.scale * upcast(move.query)[:, :, rows], keys)
            read = upcast(move.read_value)[:, :, columns], upcast(move.read_output)[:, :, rows]
            moves.append(_covariance(slope * scores, *read))
    weight, own_slope = torch.cat(own, -1).unbind()
    gap = values - o
    first = _transposed_turns(alpha, k, rotary)
    mean_key = torch.cat(mean_keys, 2) * query_weights.unsqueeze(-1)
    mean_key = mean_key if rotary is None else rotary.turn(mean_key, -1.0)
    query_sum = _outer(o, mean_key, _outer(values, first))
    turned = q if rotary is None else rotary.turn(q, -1.0)
    key_weights = attends.scale * w * own_slope
    query_pull = key_pull = None
    if query_norm is not None:
        query_sum = query_sum * upcast(query_norm.weight)
        query_pull = torch.cat(pulls, 2) * (query_weights / attends.scale).unsqueeze(-1)
        if not query_norm.joint:
            query_sum = query_sum - query_pull.mT @ query_norm.hat()[0] / query_norm.width
            query_pull = None
    if key_norm is not None:
        hat, rstd = key_norm.hat()
        key_weights = key_weights * per_query_head(rstd.expand(-1, shared, -1, -1), heads).squeeze(-1)
        gamma = per_query_head(upcast(key_norm.weight).expand(1, shared, 1, -1), heads)
        along = (q * per_query_head(k, heads)).sum(-1) * key_weights
        key_pull = gap * along.unsqueeze(-1)
        key_sum = _outer(gap * key_weights.unsqueeze(-1), turned * gamma)
        if not key_norm.joint:
            key_sum = key_sum - key_pull.mT @ per_query_head(hat, heads) / key_norm.width
            key_pull = None
    else:
        key_sum = _outer(gap * key_weights.unsqueeze(-1), turned)
    moved = None if move is None else torch.cat(moves, 2) + _own_move(move, q, k, weight, own_slope, attends.scale)
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
    for start in range(0, tokens, size):
        rows = slice(start, min(start + size, tokens))
        columns = slice(*attends.keys(rows.start, rows.stop, tokens))
        raw = _scores(attends.scale * q[:, :, rows], k[:, :, columns])
        capped, kappa = raw, None
        if attends.softcap is not None:
            tanh = torch.tanh(raw / attends.softcap)
            capped, kappa = attends.softcap * tanh, 1 - tanh.square()
        a = _softmax(capped, attends, rows, columns)
        yield rows, columns, raw, a, a if kappa is None else a * kappa


def _softmax(scores: Tensor, attends: Attends, rows: slice, columns: slice) -> Tensor:
    bias = attends.bias(rows, columns, scores)
    if bias is not None:
        scores = scores + bias
    sinks = attends.sinks
    if attends.mask is None and sinks is None:
        return torch.softmax(scores, -1)
    # Fully masked queries, as at padding, have weights of 0.
    some = (scores > -torch.inf).any(-1, keepdim=True)
    scores = torch.where(some, scores, 0.0)
    if sinks is None:
        return torch.softmax(scores, -1) * some
    total = torch.logaddexp(torch.logsumexp(scores, -1, keepdim=True), upcast(sinks).view(1, -1, 1, 1))
    return torch.exp(scores - total) * some


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """q_i·k_j of heads that share keys: (B, H, n, d) and (B, K, m, d) → (B, H, n, m)."""
    return (_grouped(queries, keys) @ keys.mT).view(*queries.shape[:3], keys.shape[2])


def _mix(weights: Tensor, rows: Tensor) -> Tensor:
    """Σ_j weights_ij row_j of heads that may share rows: (B, H, n, m) and (B, K, m, c) → (B, H, n, c)."""
    return (_grouped(weights, rows) @ rows).view(*weights.shape[:3], rows.shape[-1])


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


def _transposed_turns(alpha: Tensor, key: Tensor, rotary: Rotary | None) -> Tensor:
    """Σ_i w_i a_ij R_iᵀk_j of every query head, (B, H, T, d), from the sums over queries."""
    k = per_query_head(key, alpha.shape[1])
    if rotary is None:
        return alpha * k
    count = rotary.cos.shape[-1]
    cos, sin, one = alpha[..., :count], alpha[..., count : 2 * count], alpha[..., 2 * count :]
    x, y, rest = rotary.pairs(k)
    return rotary.join(cos * x + sin * y, cos * y - sin * x, one * rest)


def _own_move(move: Move, q: Tensor, k: Tensor, weight: Tensor, own_slope: Tensor, scale: float) -> Tensor:
    """The terms of the token's own key and value in δo_i."""
    heads = q.shape[1]
    key = k if move.key is None else upcast(move.key)
    score = own_slope * scale * (q * per_query_head(key, heads)).sum(-1)
    gap = per_query_head(upcast(move.read_value), heads) - upcast(move.read_output)
    return score.unsqueeze(-1) * gap + weight.unsqueeze(-1) * per_query_head(upcast(move.value), heads)
