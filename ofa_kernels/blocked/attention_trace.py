"""`reference.attention_trace` on a CPU: a few sequences at a time, and in them a few queries.

What a token's own key and value add is put on the diagonal of the weights, so that it costs no products of its own:

    tangent_i = Σ_j (w_ij + δ_ij a_ii) v_j − (Σ_j w_ij) o_i − a_ii b_v,        w_ij = a_ij t_ij + δ_ij a_ii u_i
    trace_i = Σ_j a_ij scale f_ij + a_ii (c_v + scale x_i)

    t_ij = scale q̃_i·k_j,   u_i = scale q_i·k̃_i,   f_ij = angle_i·turn_j − aim_i·k_j,   x_i = q_i·R_i m_i

with q̃ and k̃ the queries and keys less their shifts; the other names are those of the reference. Without shifts t is the
score and u its diagonal. Keys that no query of a block may attend to are left out: half of them under a causal mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ofa_kernels.fused import attention_trace as fused
from ofa_kernels.fused.attention_moments import Attends
from ofa_kernels.fused.attention_trace import image_gradients, images
from ofa_kernels.fused.mlp_trace import refuse_gradients
from ofa_kernels.fused.precision import full_precision
from ofa_kernels.reference.attention_moments import bias, check_window
from ofa_kernels.reference.attention_trace import HeadNorm, Rotary, check_attention_trace, tangent
from ofa_kernels.reference.stream import widen

QUERIES = 32
"""Queries of a block: few, since all keys up to the last of them are multiplied with all of them."""

ELEMENTS = 262144
"""Elements of the query heads that are worked on at a time, per thread: of fewer, the calls cost more than the
second-level cache saves (steps of 10 x 48 tokens, one thread: 2.40 plain ones with a quarter of it, 2.32 with this).
"""


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
) -> tuple[Tensor, Tensor]:
    """As `reference.attention_trace`; differentiable once, not in shifts, mask and angles.

    Heads with norms of their own take the way of `fused.attention_trace`.

    Raises:
        ValueError: shapes that do not match.
        RuntimeError: a shift or the mask requires a gradient, which only the reference has.
    """
    if query_norm is not None or key_norm is not None:
        return fused.attention_trace(
            query,
            key,
            value,
            output,
            query_trace,
            key_trace,
            value_trace,
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
        )
    shifts = query_shift, key_shift, value_shift
    given = query, key, value, output, query_trace, key_trace, value_trace
    check_attention_trace(*given, *shifts)
    check_window(window)
    refuse_gradients(query_shift=query_shift, key_shift=key_shift, value_shift=value_shift, mask=mask)
    turns = (None, None, False) if rotary is None else (rotary.cos, rotary.sin, rotary.interleaved)
    result: tuple[Tensor, Tensor] = _AttentionTrace.apply(*given, *shifts, mask, *turns, scale, causal, window)
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
    ) -> tuple[Tensor, Tensor]:
        ctx.interleaved, ctx.scale, ctx.attends = interleaved, scale, Attends(causal, window)
        ctx.set_materialize_grads(False)
        shifts = query_shift, key_shift, value_shift
        given: tuple[Any, ...] = query, key, value, output, value_trace, *shifts, mask, cos, sin
        # Tokens first, as models lay heads out in front of the last projection.
        result = torch.empty_like(output.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        with full_precision(query):
            made = images(value, output, query_trace, key_trace)
            trace = made[0].new_zeros((query.shape[0], query.shape[2]))
            attention = _Attention(*(*given, *made, interleaved, scale, ctx.attends))
            for part in attention.parts():
                heads = attention.heads(part)
                for block in heads.blocks():
                    part.query(result)[:, :, block.rows] = heads.tangent(block).view(part.shape(-1, value.shape[-1]))
                    trace[part.sequences, block.rows] += heads.trace(block).view(part.shape(-1)).sum(1)
        ctx.save_for_backward(query_trace, key_trace, *given, *made)
        return result, trace

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_tangent: Tensor | None, grad_trace: Tensor | None) -> tuple[Tensor | None, ...]:
        query_trace, key_trace, *saved = ctx.saved_tensors
        query, key, value, output, value_trace = saved[:5]
        made = saved[-3:]
        zero = made[0].new_zeros(())
        d_tangent = zero.expand(output.shape) if grad_tangent is None else grad_tangent
        d_trace = zero.expand(query.shape[0], query.shape[2]) if grad_trace is None else grad_trace
        d_query, d_key, d_value, d_output = (torch.empty_like(x, dtype=zero.dtype) for x in (query, key, value, output))
        d_images = [torch.empty_like(x) for x in made]
        d_value_trace = torch.zeros_like(value_trace, dtype=zero.dtype)
        with full_precision(query):
            attention = _Attention(*(*saved, ctx.interleaved, ctx.scale, ctx.attends))
            for part in attention.parts():
                heads = attention.heads(part)
                grads = _Gradients(heads, part.rows(widen(d_tangent)), d_trace[part.sequences])
                for block in heads.blocks():
                    grads.add(block)
                grads.finish()
                per_query = grads.query, grads.output, grads.turned, grads.aimed, grads.matched
                for total, grad in zip((d_query, d_output, *d_images), per_query, strict=True):
                    part.query(total).copy_(grad.view(part.shape(*grad.shape[-2:])))
                for total, grad in ((d_key, grads.key), (d_value, grads.value)):
                    part.key(total).copy_(grad.view(len(part.key(total)), -1, *grad.shape[-2:]))
                d_value_trace[part.heads] += grads.value_trace
            d_traces = image_gradients(d_images, (value, output), (query_trace, key_trace), (d_value, d_output))
        grads_out = d_query, d_key, d_value, d_output, *d_traces, d_value_trace
        inputs = query, key, value, output, query_trace, key_trace, value_trace
        return *(grad.to(x.dtype) for grad, x in zip(grads_out, inputs, strict=True)), *(None,) * 10


@dataclass(frozen=True)
class _Part:
    """Some sequences and some key heads, with the query heads that share them."""

    sequences: slice
    shared: slice
    groups: int

    @property
    def heads(self) -> slice:
        """The query heads."""
        return slice(self.shared.start * self.groups, self.shared.stop * self.groups)

    def shape(self, *last: int) -> tuple[int, ...]:
        """(sequences, query heads, *last) of the part."""
        return (
            self.sequences.stop - self.sequences.start,
            (self.shared.stop - self.shared.start) * self.groups,
            *last,
        )

    def query(self, tensor: Tensor) -> Tensor:
        """The part of a tensor with query heads, (B, H, ...)."""
        return tensor[self.sequences, self.heads]

    def key(self, tensor: Tensor) -> Tensor:
        """The part of a tensor with key heads, (B, K, ...)."""
        return tensor[self.sequences, self.shared]

    def rows(self, tensor: Tensor) -> Tensor:
        """The part of (B, H, T, d), as (N, G, T, d): N counts sequences and key heads, G the heads that share one."""
        return self.query(tensor).unflatten(1, (-1, self.groups)).flatten(0, 1)

    def columns(self, tensor: Tensor) -> Tensor:
        """The part of (B, K, S, d), as (N, S, d)."""
        return self.key(tensor).flatten(0, 1)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The part of (B or 1, H or 1, ...), expanded to (N, G, ...)."""
        tensor = tensor[self.sequences] if tensor.shape[0] > 1 else tensor
        tensor = tensor[:, self.heads] if tensor.shape[1] > 1 else tensor
        tensor = tensor.expand(self.shape(*tensor.shape[2:]))
        return tensor.unflatten(1, (-1, self.groups)).flatten(0, 1)


@dataclass(frozen=True)
class _Attention:
    """Everything there is to know of an attention, all sequences and heads; see `reference.attention_trace`."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    value_trace: Tensor
    query_shift: Tensor | None
    key_shift: Tensor | None
    value_shift: Tensor | None
    mask: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    turned: Tensor
    aimed: Tensor
    matched: Tensor
    interleaved: bool
    scale: float
    attends: Attends

    def parts(self) -> Iterator[_Part]:
        """Parts of a size that fits the cache."""
        (sequences, heads, tokens, width), shared = self.query.shape, self.key.shape[1]
        groups = heads // shared
        size = max(1, ELEMENTS * torch.get_num_threads() // max(1, groups * tokens * width))
        at_once, step = max(1, size // shared), min(shared, size)
        for first in range(0, sequences, at_once):
            for head in range(0, shared, step):
                yield _Part(
                    slice(first, min(first + at_once, sequences)), slice(head, min(head + step, shared)), groups
                )

    def heads(self, part: _Part) -> _Heads:
        """A part, with everything computed that does not depend on pairs of tokens."""
        rotary = self._rotary(part)
        query, key = part.rows(widen(self.query)).contiguous(), part.columns(widen(self.key)).contiguous()
        turned = part.rows(self.turned)
        angle, turn = _features(key.unsqueeze(1), turned, rotary)
        mask = None if self.mask is None else part.broadcast(self.mask[(None,) * (4 - self.mask.dim())])
        return _Heads(
            query=query,
            key=key,
            value=part.columns(widen(self.value)).contiguous(),
            output=part.rows(widen(self.output)),
            turned=turned,
            angle=angle,
            turn=turn,
            aim=_rotate(part.rows(self.aimed), rotary),
            match=_rotate(part.rows(self.matched), rotary),
            value_trace=part.broadcast(widen(self.value_trace)[None, :, None]),
            query_moved=self._moved(part, self.query, self.query_shift, part.rows),
            key_moved=self._moved(part, self.key, self.key_shift, part.columns),
            value_shift=self._value_shift(part),
            mask=mask,
            rotary=rotary,
            scale=self.scale,
            attends=self.attends,
            sequences=part.shape()[0],
        )

    def _rotary(self, part: _Part) -> Rotary | None:
        """The embedding of a part, cos and sin as (1 or N, 1, T, p)."""
        if self.cos is None or self.sin is None:
            return None
        shared = part.shared.stop - part.shared.start
        one = self.cos.shape[0] == 1
        cos, sin = (widen(x if one else x[part.sequences].repeat_interleave(shared, 0)) for x in (self.cos, self.sin))
        return Rotary(cos.unsqueeze(1), sin.unsqueeze(1), self.interleaved)

    def _moved(
        self, part: _Part, heads: Tensor, shift: Tensor | None, take: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        """Queries or keys less what of them does not come from n − β; None where that is nothing."""
        if shift is None:
            return None
        whole = None if self.cos is None or self.sin is None else Rotary(self.cos, self.sin, self.interleaved)
        return take(tangent(heads, shift, None, whole)).contiguous()

    def _value_shift(self, part: _Part) -> Tensor | None:
        if self.value_shift is None:
            return None
        shifts = widen(self.value_shift).unsqueeze(0).expand(self.key.shape[0], -1, -1)
        return part.columns(shifts)[:, None, None]


@dataclass(frozen=True)
class _Block:
    """Some queries and the keys that they may attend to, matrices of (N, G, rows, columns).

    `offset` is where the first query finds its own key among the columns.
    """

    rows: slice
    columns: slice
    moved: Tensor
    """t"""
    form: Tensor
    """f"""
    weights: Tensor
    """a"""
    spread: Tensor
    """w, with a_ii added to its diagonal"""
    total: Tensor
    """Σ_j w_ij, (N, G, rows, 1)"""
    own: Tensor
    """u, (N, G, rows)"""
    offset: int

    def diagonal(self, matrix: Tensor) -> Tensor:
        """What a matrix has for every query's own key, (N, G, rows)."""
        return matrix.diagonal(self.offset, -2, -1)


@dataclass(frozen=True)
class _Heads:
    """A part of an attention in float32: (N, G, T, ·) for queries, (N, S, ·) for keys; see `_Part.rows`."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    turned: Tensor
    angle: Tensor | None
    turn: Tensor
    aim: Tensor
    match: Tensor
    """R_i m_i"""
    value_trace: Tensor
    query_moved: Tensor | None
    key_moved: Tensor | None
    value_shift: Tensor | None
    mask: Tensor | None
    rotary: Rotary | None
    scale: float
    attends: Attends
    sequences: int

    def blocks(self) -> Iterator[_Block]:
        """The blocks of all queries, in order."""
        tokens = self.query.shape[2]
        for first in range(0, tokens, QUERIES):
            rows = slice(first, min(first + QUERIES, tokens))
            yield self._block(rows, self.attends.keys(rows.start, rows.stop, tokens))

    def tangent(self, block: _Block) -> Tensor:
        """(N, G, rows, e)"""
        moved = self.products(block.spread, self.value[:, block.columns])
        moved.addcmul_(block.total, self.output[:, :, block.rows], value=-1)
        if self.value_shift is not None:
            moved.addcmul_(block.diagonal(block.weights).unsqueeze(-1), self.value_shift, value=-1)
        return moved

    def trace(self, block: _Block) -> Tensor:
        """(N, G, rows)"""
        mean = (block.weights * block.form).sum(-1)
        return torch.add(block.diagonal(block.weights) * self.own_trace(block.rows), mean, alpha=self.scale)

    def own_trace(self, rows: slice) -> Tensor:
        """c_v + scale x, (N, G, rows)."""
        x = (self.query[:, :, rows] * self.match[:, :, rows]).sum(-1)
        return torch.add(self.value_trace, x, alpha=self.scale)

    def products(self, rows: Tensor, columns: Tensor, alpha: float = 1.0) -> Tensor:
        """Alpha times (N, G, rows, ·) times (N, ·, ·): one product for all heads that share a key."""
        flat = rows.flatten(1, 2)
        product = torch.baddbmm(flat.new_zeros(()), flat, columns, beta=0, alpha=alpha)
        return product.unflatten(1, (rows.shape[1], -1))

    def _block(self, rows: slice, columns: slice) -> _Block:
        key = self.key[:, columns]
        scores = self.products(self.query[:, :, rows], key.mT, self.scale)
        form = _form(self.angle, self.turn, rows, columns)
        form.flatten(1, 2).baddbmm_(self.aim[:, :, rows].flatten(1, 2), key.mT, alpha=-1)
        moved = scores
        if self.query_moved is not None:
            moved = self.products(self.query_moved[:, :, rows], key.mT, self.scale)
        weights = self._weights(scores, rows, columns)
        offset = rows.start - columns.start
        own_weights = weights.diagonal(offset, -2, -1)
        own = scores.diagonal(offset, -2, -1)
        if self.key_moved is not None:
            own = self.scale * (self.query[:, :, rows] * self.key_moved[:, None, rows]).sum(-1)
        spread = weights * moved
        diagonal = spread.diagonal(offset, -2, -1)
        diagonal.addcmul_(own_weights, own)
        total = spread.sum(-1, keepdim=True)
        diagonal.add_(own_weights)
        return _Block(rows, columns, moved, form, weights, spread, total, own, offset)

    def _weights(self, scores: Tensor, rows: slice, columns: slice) -> Tensor:
        causal, window = self.attends.causal, self.attends.window
        if self.mask is None and not causal and window is None:
            return torch.softmax(scores, -1)
        mask = self.mask
        if mask is not None:
            mask = mask[:, :, rows] if mask.shape[2] > 1 else mask
            mask = mask[..., columns] if mask.shape[3] > 1 else mask
        shape = rows.stop - rows.start, columns.stop - columns.start
        added = bias(mask, *shape, causal, window, scores, rows.start - columns.start)
        weights = torch.softmax(scores + added, -1)
        # Only a mask can leave a query without any key; its weights are 0/0.
        return weights if mask is None else weights.nan_to_num_(0.0)


class _Gradients:
    """Gradients of one part: `add` every block, then `finish`."""

    def __init__(self, heads: _Heads, d_tangent: Tensor, d_trace: Tensor) -> None:
        """For the gradients of the tangent, (N, G, T, e), and of the trace, (sequences, T)."""
        self._heads, self._d_tangent = heads, d_tangent
        shape = heads.query.shape[:3]
        every = d_trace[:, None, None].expand(-1, shape[0] // heads.sequences, shape[1], -1)
        self._d_trace = widen(every.flatten(0, 1))
        self._own_weights = heads.query.new_empty(shape)
        self._turn = torch.zeros_like(heads.turn)
        self.query, self.output = (torch.empty_like(x, memory_format=_DENSE) for x in (heads.query, heads.output))
        self.aimed = self.matched = torch.empty_like(heads.aim)
        self.key, self.value = torch.zeros_like(heads.key), torch.zeros_like(heads.value)
        self.turned = heads.turned
        self.value_trace = heads.value_trace

    def add(self, block: _Block) -> None:
        """The share of a block's queries."""
        heads, rows, columns = self._heads, block.rows, block.columns
        d_tangent, d_trace = self._d_tangent[:, :, rows], self._d_trace[:, :, rows]
        own_weights = block.diagonal(block.weights)
        self._own_weights[:, :, rows] = own_weights
        d_spread = heads.products(d_tangent, heads.value[:, columns].mT)
        d_own_weights = block.diagonal(d_spread).clone()
        d_spread -= (d_tangent * heads.output[:, :, rows]).sum(-1, keepdim=True)
        own_spread = block.diagonal(d_spread)
        d_own = own_weights * own_spread
        # Of the weights: through w and the trace everywhere, and through what is added on the diagonal.
        if heads.value_shift is not None:
            d_own_weights -= (d_tangent * heads.value_shift).sum(-1)
        d_own_weights.addcmul_(own_spread, block.own).addcmul_(d_trace, heads.own_trace(rows))
        form_scale = heads.scale * d_trace.unsqueeze(-1)
        d_weights = (d_spread * block.moved).addcmul_(block.form, form_scale)
        block.diagonal(d_weights).add_(d_own_weights)
        d_scores = torch._softmax_backward_data(d_weights, block.weights, -1, d_weights.dtype)
        self._add_scores(block, d_scores, d_spread.mul_(block.weights), d_own)
        self._add_form(block, block.weights * form_scale)
        torch.mul(d_tangent, block.total, out=self.output[:, :, rows]).neg_()
        self._gather(self.value, columns, block.spread, d_tangent)

    def finish(self) -> None:
        """From features and rotated rows to the tensors that they were made of."""
        heads = self._heads
        d_match = self._own_weights * self._d_trace
        sizes = heads.sequences, -1, *d_match.shape[1:]
        self.value_trace = d_match.view(sizes).sum((0, 3)).flatten()
        d_match = d_match.mul_(heads.scale).unsqueeze(-1)
        self.query.addcmul_(d_match, heads.match)
        self.matched = _rotate(d_match * heads.query, heads.rotary, -1.0)
        self.aimed = _rotate(self.aimed, heads.rotary, -1.0)
        d_key, self.turned = _feature_gradients(self._turn, heads.key.unsqueeze(1), heads.turned, heads.rotary)
        self.key += d_key.sum(1)

    def _add_scores(self, block: _Block, d_scores: Tensor, d_moved: Tensor, d_own: Tensor) -> None:
        heads, rows, columns = self._heads, block.rows, block.columns
        key, query = heads.key[:, columns], heads.query[:, :, rows]
        if heads.query_moved is None or heads.key_moved is None:
            d_scores += d_moved
            block.diagonal(d_scores).add_(d_own)
            self.query[:, :, rows] = heads.products(d_scores, key, heads.scale)
        else:
            self._gather(self.key, columns, d_moved, heads.query_moved[:, :, rows], heads.scale)
            self.query[:, :, rows] = heads.products(d_scores + d_moved, key, heads.scale)
            d_along = heads.scale * d_own.unsqueeze(-1)
            self.query[:, :, rows].addcmul_(d_along, heads.key_moved[:, None, rows])
            self.key[:, rows] += (d_along * query).sum(1)
        self._gather(self.key, columns, d_scores, query, heads.scale)

    def _add_form(self, block: _Block, d_form: Tensor) -> None:
        heads, rows, columns = self._heads, block.rows, block.columns
        self.aimed[:, :, rows] = heads.products(d_form, heads.key[:, columns], -1.0)
        self._gather(self.key, columns, d_form, heads.aim[:, :, rows], -1.0)
        if heads.angle is None:
            self._turn[:, :, columns, 0] += d_form.sum(-2)
        else:
            self._turn[:, :, columns] += d_form.mT @ heads.angle[:, :, rows]

    def _gather(self, total: Tensor, columns: slice, weights: Tensor, rows: Tensor, alpha: float = 1.0) -> None:
        """Add alpha · Σ weights rows, over queries and the heads that share a key, to the total of every key."""
        total[:, columns].baddbmm_(weights.flatten(1, 2).mT, rows.flatten(1, 2), alpha=alpha)


_DENSE = torch.contiguous_format


def _features(key: Tensor, turned: Tensor, rotary: Rotary | None) -> tuple[Tensor | None, Tensor]:
    """(angle, turn) of `reference.attention_moments`; without a rotary embedding every angle is 1, and left out."""
    if rotary is None:
        return None, (key * turned).sum(-1, keepdim=True)
    (kx, ky, k_rest), (wx, wy, w_rest) = rotary.pairs(key), rotary.pairs(turned)
    pairs, rest = rotary.cos.shape[-1], k_rest.shape[-1] > 0
    turn = turned.new_empty((*turned.shape[:-1], 2 * pairs + rest))
    torch.mul(kx, wx, out=turn[..., :pairs]).addcmul_(ky, wy)
    torch.mul(ky, wx, out=turn[..., pairs : 2 * pairs]).addcmul_(kx, wy, value=-1)
    angles = [rotary.cos, rotary.sin]
    if rest:
        turn[..., -1] = (k_rest * w_rest).sum(-1)
        angles.append(torch.ones_like(rotary.cos[..., :1]))
    return torch.cat(angles, -1), turn


def _feature_gradients(d_turn: Tensor, key: Tensor, turned: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """Gradients of key (for every head) and turned values, from those of `turn`."""
    if rotary is None:
        return d_turn * turned, d_turn * key
    d_key, d_turned = (torch.empty(turned.shape, dtype=turned.dtype) for _ in range(2))
    pairs = rotary.cos.shape[-1]
    even, odd, rest = d_turn[..., :pairs], d_turn[..., pairs : 2 * pairs], d_turn[..., 2 * pairs :]
    (kx, ky, k_rest), (wx, wy, w_rest) = rotary.pairs(key), rotary.pairs(turned)
    for (to_x, to_y, to_rest), x, y, other, sign in (
        (rotary.pairs(d_key), wx, wy, w_rest, -1),
        (rotary.pairs(d_turned), kx, ky, k_rest, 1),
    ):
        torch.mul(even, x, out=to_x).addcmul_(odd, y, value=sign)
        torch.mul(even, y, out=to_y).addcmul_(odd, x, value=-sign)
        torch.mul(rest, other, out=to_rest)
    return d_key, d_turned


def _form(angle: Tensor | None, turn: Tensor, rows: slice, columns: slice) -> Tensor:
    """angle_i·turn_j of a block, (N, G, rows, columns), dense."""
    part = turn[:, :, columns]
    if angle is None:
        return part.mT.expand(-1, -1, rows.stop - rows.start, -1).clone(memory_format=_DENSE)
    return angle[:, :, rows] @ part.mT


def _rotate(heads: Tensor, rotary: Rotary | None, sign: float = 1.0) -> Tensor:
    """R_i of every row, (N, G, T, d), or R_iᵀ for `sign=-1`; dense."""
    if rotary is None:
        return heads.contiguous()
    turned = torch.empty(heads.shape, dtype=heads.dtype)
    (x, y, rest), (to_x, to_y, to_rest) = rotary.pairs(heads), rotary.pairs(turned)
    torch.mul(x, rotary.cos, out=to_x).addcmul_(y, rotary.sin, value=-sign)
    torch.mul(y, rotary.cos, out=to_y).addcmul_(x, rotary.sin, value=sign)
    to_rest.copy_(rest)
    return turned
