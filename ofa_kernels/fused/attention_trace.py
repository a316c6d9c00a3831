"""`reference.attention_trace`, keeping what attention keeps anyway and three small products.

Heads with norms of their own go through the reference's formula, and only the moments are fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ofa_kernels.fused.attention_moments import BLOCKED, MOMENTS, Moments, differentiable
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
    result: tuple[Tensor, Tensor] = _AttentionTrace.apply(
        *given, *shifts, mask, *turns, scale, causal, window, moments.name
    )
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
        moments: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.interleaved, ctx.moments, ctx.settings = interleaved, MOMENTS[moments], (scale, causal, window)
        ctx.set_materialize_grads(False)
        # Tokens first, as models lay heads out in front of the last projection.
        result = torch.empty_like(output.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        with full_precision(query):
            turned, aimed, matched = images(value, output, query_trace, key_trace)
            rotary = None if cos is None or sin is None else Rotary(cos, sin, interleaved)
            angle, turn, aim = features(key, turned, aimed, rotary)
            along = None if query_shift is None else tangent(query, query_shift, None, rotary)
            lse, mean, moved = ctx.moments.forward(
                query, key, value, output, angle, turn, aim, along, mask, scale, causal, window
            )
            value_moved = widen(value) if value_shift is None else widen(value) - widen(value_shift).unsqueeze(-2)
            key_moved, own = tangent(key, key_shift, None, rotary), own_score(query, key, mask, scale)
            moving, trace = combine(
                *(query, value, output, key_moved, value_moved, matched, own, lse, mean, moved, value_trace),
                rotary,
                scale,
            )
            result.copy_(moving)
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
        q_shift, k_shift, v_shift = shifts
        scale = ctx.settings[0]
        zero = lse.new_zeros(())
        d_moved = zero.expand(output.shape) if grad_tangent is None else widen(grad_tangent)
        d_trace = zero.expand(lse.shape) if grad_trace is None else grad_trace.unsqueeze(1).expand(lse.shape)
        with full_precision(query):
            rotary = None if cos is None else Rotary(cos, sin, ctx.interleaved)
            own = _own_token(
                query, key, value, output, matched, value_trace, k_shift, v_shift, mask, lse, rotary, scale
            ).gradients(d_moved, d_trace)
            angle, turn, aim = features(key, turned, aimed, rotary)
            along = None if q_shift is None else tangent(query, q_shift, None, rotary)
            grads = ctx.moments.backward(
                *(query, key, value, output, angle, turn, aim, along, mask),
                *(lse, own.lse, scale * d_trace, d_moved),
                *ctx.settings,
            )
            to_query, to_key, to_value, to_output, to_turn, to_aim, to_along = grads
            d_query = own.query + to_query
            d_query = d_query if to_along is None else d_query + to_along
            through_turn, d_turned = _turn_gradients(
                to_turn, per_query_head(widen(key), query.shape[1]), turned, rotary
            )
            d_key = to_key + _per_key_head(own.key + through_turn, key.shape[1])
            d_value = to_value + _per_key_head(own.gap + own.value, value.shape[1])
            d_output = to_output - own.gap
            d_aimed = to_aim if rotary is None else rotary.turn(to_aim, -1.0)
            d_images = d_turned, d_aimed, own.matched
            d_traces = image_gradients(d_images, (value, output), (query_trace, key_trace), (d_value, d_output))
        made = d_query, d_key, d_value, d_output, *d_traces, own.value_trace
        dtypes = [tensor.dtype for tensor in saved[:7]]
        return *(grad.to(dtype) for grad, dtype in zip(made, dtypes, strict=True)), *(None,) * 11


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
