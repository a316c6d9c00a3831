"""What the trace of an attention branch's Jacobian needs of every head; derived in docs/theory.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ofa_kernels.reference.attention_moments import attention_moments, check_heads, check_shapes
from ofa_kernels.reference.stream import widen

Moments = Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding R_i of queries and keys: channel pairs (x, y) → (x cos − y sin, y cos + x sin).

    Attributes:
        cos, sin: (B or 1, T, p) for the first p channel pairs of a head; the other channels pass unchanged.
        interleaved: pairs are channels (2k, 2k + 1); otherwise (k, k + p).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def first(self, sequences: int) -> Rotary:
        """The embedding of the first sequences of a batch."""
        return Rotary(self.cos[:sequences], self.sin[:sequences], self.interleaved)

    def turn(self, heads: Tensor, sign: float = 1.0) -> Tensor:
        """R_i of every row of (B, H, T, d); its transpose R_iᵀ for `sign=-1`."""
        cos, sin = widen(self.cos).unsqueeze(1), sign * widen(self.sin).unsqueeze(1)
        x, y, rest = self.pairs(heads)
        return self.join(x * cos - y * sin, y * cos + x * sin, rest)

    def pairs(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x, y) of all pairs, (..., p) each, and the channels that are not rotated."""
        count = self.cos.shape[-1]
        turned, rest = heads[..., : 2 * count], heads[..., 2 * count :]
        if self.interleaved:
            return turned[..., 0::2], turned[..., 1::2], rest
        return turned[..., :count], turned[..., count:], rest

    def join(self, x: Tensor, y: Tensor, rest: Tensor) -> Tensor:
        """The inverse of `pairs`."""
        turned = torch.stack((x, y), -1).flatten(-2) if self.interleaved else torch.cat((x, y), -1)
        return torch.cat((turned, rest), -1)


@dataclass(frozen=True)
class HeadNorm:
    """An RMSNorm of every query or key head, before it is rotated: γ ⊙ q̄/σ.

    Attributes:
        entering: q̄, what it reads, (B, H, T, d).
        weight: γ, (d,).
        eps: added to the mean square.
    """

    entering: Tensor
    weight: Tensor
    eps: float

    def hat(self) -> tuple[Tensor, Tensor]:
        """(q̄/σ, 1/σ)."""
        wide = widen(self.entering)
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide * rstd, rstd

    def normalized(self) -> Tensor:
        """γ ⊙ q̄/σ."""
        return widen(self.weight) * self.hat()[0]

    def push(self, direction: Tensor) -> Tensor:
        """D x for D = Γ(I − q̂q̂ᵀ/d)/σ, the norm's Jacobian at each row."""
        hat, rstd = self.hat()
        along = (hat * direction).mean(-1, keepdim=True)
        return widen(self.weight) * (direction - hat * along) * rstd


def attention_trace(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    query_trace: Tensor,
    key_trace: Tensor,
    value_trace: Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | None = None,
    rotary: Rotary | None = None,
    query_shift: Tensor | None = None,
    key_shift: Tensor | None = None,
    value_shift: Tensor | None = None,
    query_norm: HeadNorm | None = None,
    key_norm: HeadNorm | None = None,
    moments: Moments = attention_moments,
) -> tuple[Tensor, Tensor]:
    """How attention changes along its own token's input, and tr(A G) of every token, all heads together.

    A_i is the own-token Jacobian of the branch Σ_h W_o o_i at token i, seen from its normalized input n_i.

    Args:
        query: q, (B, H, T, d), as they enter the scores: normalized and rotated if the model does that.
        key: k, (B, K, T, d), likewise; each serves H/K consecutive heads.
        value: v, (B, K, T, e).
        output: o, (B, H, T, e), the attention output in front of W_o.
        query_trace, key_trace: M_q = W_q G W_o and M_k = W_k G W_o of every query head, (H, d, e).
        value_trace: c_v = tr(W_v G W_o), (H,).
        scale: of the scores.
        causal, window, mask: which keys a query attends to, see `attention_moments`.
        rotary: R_i, or None.
        query_shift, key_shift, value_shift: what of W n + bias does not come from n − β, (H or K, d or e), or None.
        query_norm, key_norm: norms of the heads, or None.
        moments: what computes the moments.

    Returns:
        tangent, (B, H, T, e) in the dtype of `query`: o_i moved along n_i − β, so that ñᵀAñ = ⟨ñ, W_o tangent⟩;
        trace, (B, T), float32.

    Raises:
        ValueError: shapes that do not match.
    """
    check_attention_trace(
        query, key, value, output, query_trace, key_trace, value_trace, query_shift, key_shift, value_shift
    )
    turned, aimed, matched = images(value, output, query_trace, key_trace, query_norm)
    angle, turn, aim = features(key, turned, aimed, rotary)
    t = None if query_norm is not None or query_shift is None else tangent(query, query_shift, None, rotary)
    given = query, key, value, output, angle, turn, aim
    where = {"mask": mask, "scale": scale, "causal": causal, "window": window}
    lse, mean, moved = moments(*given, t, **where)
    if query_norm is not None:
        mean = norm_mean(mean, moved, query_trace, query_norm, scale)
        if query_shift is None:
            moved = (1 - query_norm.hat()[0].square().mean(-1, keepdim=True)) * widen(moved)
        else:
            moved = moments(*given, tangent(query, query_shift, query_norm, rotary), **where)[2]
    key_moved = tangent(key, key_shift, key_norm, rotary)
    value_moved = widen(value) if value_shift is None else widen(value) - widen(value_shift).unsqueeze(-2)
    matched = matched if key_norm is None else grouped(key_norm, matched)
    own = own_score(query, key, mask, scale)
    return combine(
        query, value, output, key_moved, value_moved, matched, own, lse, mean, moved, value_trace, rotary, scale
    )


def attention_tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    query_moved: Tensor,
    key_moved: Tensor,
    value_moved: Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | None = None,
    moments: Moments = attention_moments,
) -> Tensor:
    """How every output moves when its own token's query, key and value do, and no other token's.

        δo_i = Σ_j a_ij scale (δq_i·k_j)(v_j − o_i) + a_ii (scale (q_i·δk_i)(v_i − o_i) + δv_i)

    Args and shapes are those of `attention_trace`; the three moves are shaped like query, key and value. Returns
    (B, H, T, e) in the dtype of `query`.

    Raises:
        ValueError: shapes that do not match.
    """
    check_heads(query, key, value, output)
    check_shapes({"query_moved": (query_moved, tuple(query.shape)), "key_moved": (key_moved, tuple(key.shape))})
    check_shapes({"value_moved": (value_moved, tuple(value.shape))})
    # No bilinear form: one feature that is 0.
    angle, turn = query.new_zeros((1, query.shape[2], 1)), query.new_zeros((*query.shape[:2], key.shape[2], 1))
    nothing = query.new_zeros(1).expand(query.shape)
    given = query, key, value, output, angle, turn, nothing, query_moved.to(query.dtype)
    lse, mean, moved = moments(*given, mask, scale=scale, causal=causal, window=window)
    own = own_score(query, key, mask, scale)
    no_trace = widen(query).new_zeros(query.shape[1])
    moves = key_moved, value_moved, nothing
    return combine(query, value, output, *moves, own, lse, mean, moved, no_trace, None, scale)[0]


def check_attention_trace(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    query_trace: Tensor,
    key_trace: Tensor,
    value_trace: Tensor,
    query_shift: Tensor | None,
    key_shift: Tensor | None,
    value_shift: Tensor | None,
) -> None:
    """Refuse, with a ValueError, heads and constants that do not fit together."""
    check_heads(query, key, value, output)
    (_, heads, _, width), shared, depth = query.shape, key.shape[1], value.shape[3]
    expected = {
        "query_trace": (query_trace, (heads, width, depth)),
        "key_trace": (key_trace, (heads, width, depth)),
        "value_trace": (value_trace, (heads,)),
        "query_shift": (query_shift, (heads, width)),
        "key_shift": (key_shift, (shared, width)),
        "value_shift": (value_shift, (shared, depth)),
    }
    check_shapes(expected)


def images(
    value: Tensor, output: Tensor, query_trace: Tensor, key_trace: Tensor, query_norm: HeadNorm | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(Γ_q M_q v_j, Γ_q M_q o_i, M_k (v_i − o_i)) of every query head, (B, H, T, d); Γ_q = 1 without a norm."""
    v, o = per_query_head(widen(value), output.shape[1]), widen(output)
    to_query, to_key = widen(query_trace).mT, widen(key_trace).mT
    if query_norm is not None:
        to_query = to_query * widen(query_norm.weight)
    return v @ to_query, o @ to_query, (v - o) @ to_key


def features(key: Tensor, turned: Tensor, aimed: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
    """(angle, turn, aim) of `attention_moments`, so that angle_i·turn_j = k_jᵀ R_i w_j and aim_i = R_i y_i.

    k_jᵀ R_i w_j splits into what depends on i and what depends on j, pair by pair:
    cos θ_i (k_x w_x + k_y w_y) + sin θ_i (k_y w_x − k_x w_y). Channels that are not rotated add k·w for every i.
    """
    k = per_query_head(widen(key), turned.shape[1])
    if rotary is None:
        return k.new_ones((1, k.shape[-2], 1)), (k * turned).sum(-1, keepdim=True), aimed
    (kx, ky, k_rest), (wx, wy, w_rest) = rotary.pairs(k), rotary.pairs(turned)
    parts, angles = [kx * wx + ky * wy, ky * wx - kx * wy], [widen(rotary.cos), widen(rotary.sin)]
    if k_rest.shape[-1]:
        parts.append((k_rest * w_rest).sum(-1, keepdim=True))
        angles.append(torch.ones_like(angles[0][..., :1]))
    return torch.cat(angles, -1), torch.cat(parts, -1), rotary.turn(aimed)


def tangent(heads: Tensor, shift: Tensor | None, norm: HeadNorm | None, rotary: Rotary | None) -> Tensor:
    """How queries or keys change when n moves along n − β: R_i D W(n − β)."""
    if norm is None:
        if shift is None:
            return widen(heads)
        constant = widen(shift).unsqueeze(-2).expand(heads.shape)
        return widen(heads) - (constant if rotary is None else rotary.turn(constant))
    entering = widen(norm.entering)
    pushed = norm.push(entering if shift is None else entering - widen(shift).unsqueeze(-2))
    return pushed if rotary is None else rotary.turn(pushed)


def norm_mean(mean: Tensor, covariance: Tensor, query_trace: Tensor, norm: HeadNorm, scale: float) -> Tensor:
    """The mean of k_jᵀ R_i D_i M_q (v_j − o_i), from that with Γ for D and the covariance with the scores."""
    hat, rstd = norm.hat()
    along = (hat * (widen(covariance) @ widen(query_trace).mT)).mean(-1)
    return rstd.squeeze(-1) * (mean - along / scale)


def own_score(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The score of every token with itself, (B, H, T); −inf where the mask forbids it."""
    score = scale * (widen(query) * per_query_head(widen(key), query.shape[1])).sum(-1)
    if mask is None:
        return score
    rows = query.shape[-2]
    own = mask.expand(*mask.shape[:-2], rows, rows).diagonal(dim1=-2, dim2=-1)
    return score.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else score + own


def combine(
    query: Tensor,
    value: Tensor,
    output: Tensor,
    key_moved: Tensor,
    value_moved: Tensor,
    matched: Tensor,
    own: Tensor,
    lse: Tensor,
    mean: Tensor,
    moved: Tensor,
    value_trace: Tensor,
    rotary: Rotary | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`attention_trace` from the moments: adds what a token's own key and value contribute."""
    q, o, heads = widen(query), widen(output), query.shape[1]
    key_moved, value_moved, v = (per_query_head(x, heads) for x in (key_moved, value_moved, widen(value)))
    # A query that attends to nothing has weight 0 for itself: lse and own are both −inf there.
    weight = torch.exp(own - torch.where(lse == -torch.inf, 0.0, lse)).unsqueeze(-1)
    turned = matched if rotary is None else rotary.turn(matched)
    trace = weight.squeeze(-1) * (widen(value_trace).unsqueeze(-1) + scale * (q * turned).sum(-1)) + scale * mean
    along = scale * (q * key_moved).sum(-1, keepdim=True)
    moved = widen(moved) + weight * (along * (v - o) + value_moved)
    return moved.to(query.dtype), trace.sum(1)


def per_query_head(shared: Tensor, heads: int) -> Tensor:
    """(B, K, T, ·) with every key or value head repeated for the query heads that it serves."""
    return shared.repeat_interleave(heads // shared.shape[1], 1)


def grouped(norm: HeadNorm, matched: Tensor) -> Tensor:
    """D_k x of every query head, for the norm of the key heads."""
    heads = matched.shape[1]
    return HeadNorm(per_query_head(norm.entering, heads), norm.weight, norm.eps).push(matched)
