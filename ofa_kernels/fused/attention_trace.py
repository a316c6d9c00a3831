"""`reference.attention_trace`, keeping what attention keeps anyway and three small products.

Heads with norms of their own go through the reference's formula, and only the moments are fused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ofa_kernels.fused.attention_moments import BLOCKED, Moments, differentiable
from ofa_kernels.fused.mlp_trace import refuse_gradients
from ofa_kernels.fused.precision import full_precision
from ofa_kernels.reference.attention_trace import (
    HeadNorm,
    Rotary,
    check_attention_trace,
    combine,
    features,
    own_score,
    per_query_head,
    tangent,
)
from ofa_kernels.reference.attention_trace import attention_trace as by_formula
from ofa_kernels.reference.stream import widen


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
    moments: Moments = BLOCKED,
) -> tuple[Tensor, Tensor]:
    """As `reference.attention_trace`; differentiable once, in everything but shifts, mask and rotary angles.

    Raises:
        ValueError: shapes that do not match.
        RuntimeError: a shift requires a gradient, which only the reference has.
    """
    refuse_gradients(query_shift=query_shift, key_shift=key_shift, value_shift=value_shift, mask=mask)
    given = query, key, value, output, query_trace, key_trace, value_trace
    shifts = query_shift, key_shift, value_shift
    check_attention_trace(*given, *shifts)
    if query_norm is not None or key_norm is not None:
        with full_precision(query):
            return by_formula(
                *given,
                scale=scale,
                causal=causal,
                window=window,
                mask=mask,
                rotary=rotary,
                query_shift=query_shift,
                key_shift=key_shift,
                value_shift=value_shift,
                query_norm=query_norm,
                key_norm=key_norm,
                moments=differentiable(moments),
            )
    turns = (None, None, False) if rotary is None else (rotary.cos, rotary.sin, rotary.interleaved)
    result: tuple[Tensor, Tensor] = _AttentionTrace.apply(*given, *shifts, mask, *turns, scale, causal, window, moments)
    return result


class _AttentionTrace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
        mask: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        interleaved: bool,
        scale: float,
        causal: bool,
        window: int | None,
        moments: Moments,
    ) -> tuple[Tensor, Tensor]:
        ctx.interleaved, ctx.moments, ctx.settings = interleaved, moments, (scale, causal, window)
        ctx.set_materialize_grads(False)
        sequences, heads, tokens, _ = query.shape
        # Tokens first, as models lay heads out in front of the last projection.
        result = query.new_empty((sequences, tokens, heads, value.shape[-1])).transpose(1, 2)
        with full_precision(query):
            turned, aimed, matched = images(value, output, query_trace, key_trace)
            lse = query.new_empty((sequences, heads, tokens), dtype=turned.dtype)
            trace = query.new_zeros((sequences, tokens), dtype=turned.dtype)
            for part in _parts(query, key):
                rotary = part.rotary(cos, sin, interleaved)
                q, o = part.query(query), part.query(output)
                k, v = part.key(key), part.key(value)
                shifts = part.shifts(query_shift, key_shift, value_shift)
                masked = part.mask(mask)
                angle, turn, aim = features(k, part.query(turned), part.query(aimed), rotary)
                along = None if shifts[0] is None else tangent(q, shifts[0], None, rotary)
                own_lse, mean, moved = moments.forward(q, k, v, o, angle, turn, aim, along, masked, *ctx.settings)
                part_tangent, part_trace = combine(
                    q,
                    v,
                    o,
                    tangent(k, shifts[1], None, rotary),
                    widen(v) if shifts[2] is None else widen(v) - widen(shifts[2]).unsqueeze(-2),
                    part.query(matched),
                    own_score(q, k, masked, scale),
                    own_lse,
                    mean,
                    moved,
                    value_trace[part.heads],
                    rotary,
                    scale,
                )
                part.query(result).copy_(part_tangent)
                part.query(lse).copy_(own_lse)
                trace[part.sequences] += part_trace
        given = query, key, value, output, query_trace, key_trace, value_trace
        shifts = query_shift, key_shift, value_shift
        ctx.save_for_backward(*given, *shifts, mask, cos, sin, turned, aimed, matched, lse)
        return result, trace

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_tangent: Tensor | None, grad_trace: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        query, key, value, output, query_trace, key_trace, value_trace, *shifts = saved[:10]
        mask, cos, sin, turned, aimed, matched, lse = saved[10:]
        scale = ctx.settings[0]
        zero = lse.new_zeros(())
        d_tangent = zero.expand(output.shape) if grad_tangent is None else grad_tangent
        d_trace = zero.expand(lse.shape) if grad_trace is None else grad_trace.unsqueeze(1).expand(lse.shape)
        d_query, d_key, d_value, d_output = (torch.empty_like(x, dtype=lse.dtype) for x in (query, key, value, output))
        d_turned, d_aimed, d_matched = (torch.empty_like(x) for x in (turned, aimed, matched))
        d_value_trace = torch.zeros_like(value_trace, dtype=lse.dtype)
        with full_precision(query):
            for part in _parts(query, key):
                rotary = part.rotary(cos, sin, ctx.interleaved)
                q, o, w = part.query(query), part.query(output), part.query(turned)
                k, v = part.key(key), part.key(value)
                q_shift, k_shift, v_shift = part.shifts(*shifts)
                masked, part_lse = part.mask(mask), part.query(lse)
                moved, traced = widen(part.query(d_tangent)), part.query(d_trace)
                own = _own_token(
                    q,
                    k,
                    v,
                    o,
                    part.query(matched),
                    value_trace[part.heads],
                    k_shift,
                    v_shift,
                    masked,
                    part_lse,
                    rotary,
                    scale,
                ).gradients(moved, traced)
                angle, turn, aim = features(k, w, part.query(aimed), rotary)
                along = None if q_shift is None else tangent(q, q_shift, None, rotary)
                grads = ctx.moments.backward(
                    q,
                    k,
                    v,
                    o,
                    angle,
                    turn,
                    aim,
                    along,
                    masked,
                    part_lse,
                    own.lse,
                    scale * traced,
                    moved,
                    *ctx.settings,
                )
                to_query, to_key, to_value, to_output, to_turn, to_aim, to_along = grads
                assert to_key is not None
                assert to_value is not None
                assert to_output is not None
                assert to_turn is not None
                assert to_aim is not None
                whole = own.query + to_query
                part.query(d_query).copy_(whole if to_along is None else whole + to_along)
                through_turn, to_turned = _turn_gradients(to_turn, per_query_head(widen(k), q.shape[1]), w, rotary)
                part.key(d_key).copy_(to_key + _per_key_head(own.key + through_turn, k.shape[1]))
                part.key(d_value).copy_(to_value + _per_key_head(own.gap + own.value, v.shape[1]))
                torch.sub(to_output, own.gap, out=part.query(d_output))
                part.query(d_turned).copy_(to_turned)
                part.query(d_aimed).copy_(to_aim if rotary is None else rotary.turn(to_aim, -1.0))
                part.query(d_matched).copy_(own.matched)
                d_value_trace[part.heads] += own.value_trace
            d_traces = image_gradients(
                (d_turned, d_aimed, d_matched), (value, output), (query_trace, key_trace), (d_value, d_output)
            )
        grads = d_query, d_key, d_value, d_output, *d_traces, d_value_trace
        dtypes = [tensor.dtype for tensor in saved[:7]]
        return *(grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)), *(None,) * 11


BLOCK = 65536
"""Elements of the query heads that are worked on at a time, per thread: what is made of them stays in the cache."""


@dataclass(frozen=True)
class _Part:
    """Some sequences and some key heads, with the query heads that share them."""

    sequences: slice
    shared: slice
    heads: slice

    def query(self, tensor: Tensor) -> Tensor:
        """The part of a tensor with query heads, (B, H, ...)."""
        return tensor[self.sequences, self.heads]

    def key(self, tensor: Tensor) -> Tensor:
        """The part of a tensor with key heads, (B, K, ...)."""
        return tensor[self.sequences, self.shared]

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """The part of a mask, which may leave out leading dimensions or have 1 there."""
        if mask is None or mask.dim() < 3:
            return mask
        mask = mask if mask.dim() == 4 else mask.unsqueeze(0)
        mask = mask[self.sequences] if mask.shape[0] > 1 else mask
        return mask[:, self.heads] if mask.shape[1] > 1 else mask

    def rotary(self, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Rotary | None:
        """The rotary embedding of these sequences."""
        if cos is None or sin is None:
            return None
        cos, sin = (x[self.sequences] if x.shape[0] > 1 else x for x in (cos, sin))
        return Rotary(cos, sin, interleaved)

    def shifts(
        self, query: Tensor | None, key: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The shifts of these heads."""
        return (
            None if query is None else query[self.heads],
            None if key is None else key[self.shared],
            None if value is None else value[self.shared],
        )


def _parts(query: Tensor, key: Tensor) -> Iterator[_Part]:
    """Parts of a size that fits the cache; everything at once on a GPU."""
    (sequences, heads, tokens, width), shared = query.shape, key.shape[1]
    groups = heads // shared
    size = max(1, BLOCK * torch.get_num_threads() // max(1, groups * tokens * width))
    if query.device.type != "cpu":
        size = sequences * shared
    at_once, step = max(1, size // shared), min(shared, size)
    for first in range(0, sequences, at_once):
        for head in range(0, shared, step):
            yield _Part(
                slice(first, min(first + at_once, sequences)),
                slice(head, min(head + step, shared)),
                slice(head * groups, min(head + step, shared) * groups),
            )


def images(value: Tensor, output: Tensor, query_trace: Tensor, key_trace: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.images`: a product per head with the tokens of all sequences, (B, H, T, d) views of (H, B·T, d)."""
    v, o, gap = _image_rows(value, output)
    to_query, to_key = widen(query_trace).mT, widen(key_trace).mT
    rows = torch.bmm(v, to_query), torch.bmm(o, to_query), torch.bmm(gap, to_key)
    turned, aimed, matched = (x.unflatten(1, (len(output), output.shape[2])).transpose(0, 1) for x in rows)
    return turned, aimed, matched


def image_gradients(
    grads: Sequence[Tensor],
    inputs: tuple[Tensor, Tensor],
    traces: tuple[Tensor, Tensor],
    totals: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients of M_q and M_k; those of value and output are added to `totals`."""
    d_turned, d_aimed, d_matched = (_head_rows(x) for x in grads)
    v, o, gap = _image_rows(*inputs)
    to_query, to_key = (widen(trace) for trace in traces)
    d_value, d_output = totals
    through_gap = torch.bmm(d_matched, to_key)
    d_v = torch.baddbmm(through_gap, d_turned, to_query)
    d_o = torch.baddbmm(through_gap, d_aimed, to_query, beta=-1)
    shape = len(d_value), d_value.shape[2]
    d_output += d_o.unflatten(1, shape).transpose(0, 1)
    d_value += d_v.unflatten(0, (d_value.shape[1], -1)).sum(1).unflatten(1, shape).transpose(0, 1)
    d_query_trace = torch.baddbmm(torch.bmm(d_turned.mT, v), d_aimed.mT, o)
    return d_query_trace, torch.bmm(d_matched.mT, gap)


def _image_rows(value: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """v, o and v − o of every query head, (H, B·T, e)."""
    v, o = _head_rows(widen(value)), _head_rows(widen(output))
    v = v.repeat_interleave(len(o) // len(v), 0)
    return v, o, v - o


def _head_rows(heads: Tensor) -> Tensor:
    """(B, H, T, d) as (H, B·T, d); a view where tokens or heads come first in memory."""
    return heads.transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class _OwnGradients:
    """Of what a token's own key and value contribute, per query head; `gap` is v − o."""

    query: Tensor
    key: Tensor
    value: Tensor
    gap: Tensor
    matched: Tensor
    lse: Tensor
    value_trace: Tensor


@dataclass(frozen=True)
class _OwnToken:
    """w(c_v + scale q·ρ) of the trace and w(scale q·k̃ (v − o) + ṽ) of the tangent, w = exp(own − lse), ρ = R m."""

    query: Tensor
    key: Tensor
    key_moved: Tensor
    value_moved: Tensor
    gap: Tensor
    weight: Tensor
    match: Tensor
    """scale q·ρ, with a last dimension of 1 as `weight` and `along`"""
    along: Tensor
    """scale q·k̃"""
    turned: Tensor
    value_trace: Tensor
    rotary: Rotary | None
    scale: float

    def gradients(self, d_moved: Tensor, d_trace: Tensor) -> _OwnGradients:
        """For the gradients of the tangent, (B, H, T, e), and of the trace, (B, H, T)."""
        w, d_trace = self.weight, d_trace.unsqueeze(-1)
        with_gap = (d_moved * self.gap).sum(-1, keepdim=True)
        d_weight = d_trace * (self.value_trace.view(-1, 1, 1) + self.match) + self.along * with_gap
        d_weight += (d_moved * self.value_moved).sum(-1, keepdim=True)
        d_own = d_weight * w
        d_match, d_along = self.scale * w * d_trace, self.scale * w * with_gap
        d_value = w * d_moved
        d_query = d_match * self.turned + d_along * self.key_moved + (self.scale * d_own) * self.key
        unturned = self.query if self.rotary is None else self.rotary.turn(self.query, -1.0)
        return _OwnGradients(
            query=d_query,
            key=(d_along + self.scale * d_own) * self.query,
            value=d_value,
            gap=self.along * d_value,
            matched=d_match * unturned,
            lse=-d_own.squeeze(-1),
            value_trace=(w * d_trace).sum((0, 2, 3)),
        )


def _own_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    matched: Tensor,
    value_trace: Tensor,
    key_shift: Tensor | None,
    value_shift: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    rotary: Rotary | None,
    scale: float,
) -> _OwnToken:
    heads = query.shape[1]
    q, k, v = widen(query), per_query_head(widen(key), heads), per_query_head(widen(value), heads)
    own = own_score(query, key, mask, scale)
    key_moved = k if key_shift is None else per_query_head(tangent(key, key_shift, None, rotary), heads)
    value_moved = v
    if value_shift is not None:
        value_moved = per_query_head(widen(value) - widen(value_shift).unsqueeze(-2), heads)
    turned = matched if rotary is None else rotary.turn(matched)
    return _OwnToken(
        query=q,
        key=k,
        key_moved=key_moved,
        value_moved=value_moved,
        gap=v - widen(output),
        weight=torch.exp(own - torch.where(lse == -torch.inf, 0.0, lse)).unsqueeze(-1),
        match=scale * (q * turned).sum(-1, keepdim=True),
        along=scale * (q * key_moved).sum(-1, keepdim=True),
        turned=turned,
        value_trace=widen(value_trace),
        rotary=rotary,
        scale=scale,
    )


def _turn_gradients(d_turn: Tensor, key: Tensor, turned: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """Gradients of key and turned values through the features (k_x w_x + k_y w_y, k_y w_x − k_x w_y, k·w)."""
    if rotary is None:
        return d_turn * turned, d_turn * key
    count = rotary.cos.shape[-1]
    d_even, d_odd, d_rest = d_turn[..., :count], d_turn[..., count : 2 * count], d_turn[..., 2 * count :]
    (kx, ky, k_rest), (wx, wy, w_rest) = rotary.pairs(key), rotary.pairs(turned)
    d_key = rotary.join(d_even * wx - d_odd * wy, d_even * wy + d_odd * wx, d_rest * w_rest)
    d_turned = rotary.join(d_even * kx + d_odd * ky, d_even * ky - d_odd * kx, d_rest * k_rest)
    return d_key, d_turned


def _per_key_head(per_query: Tensor, heads: int) -> Tensor:
    return per_query if per_query.shape[1] == heads else per_query.unflatten(1, (heads, -1)).sum(2)
