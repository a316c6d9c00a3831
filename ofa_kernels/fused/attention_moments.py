"""`reference.attention_moments` and its gradient, query block by query block: no matrix of all scores is ever made.

Blocks of keys that no query of a block may attend to are left out, so that causal attention takes half the products.
The gradient is derived in docs/theory.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ofa_kernels.fused.precision import full_precision
from ofa_kernels.reference.attention_moments import bias, check_attention
from ofa_kernels.reference.stream import wide_dtype, widen


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
    """As `reference.attention_moments`; differentiable once, in everything but angle and mask.

    Raises:
        ValueError: shapes that do not match.
    """
    given = query, key, value, output, angle, turn, aim, tangent, mask
    return differentiable(BLOCKED)(*given, scale=scale, causal=causal, window=window)


@dataclass(frozen=True)
class Moments:
    """An implementation of `reference.attention_moments` and of its gradient: see `forward` and `backward` here.

    Autograd functions are told its name, since `torch.compile` takes texts as arguments, and no objects.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor | None, ...]]

    def __post_init__(self) -> None:
        MOMENTS[self.name] = self


MOMENTS: dict[str, Moments] = {}
"""All implementations by name."""


def differentiable(moments: Moments) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """An implementation with its gradient, to be called like `reference.attention_moments`."""

    def call(
        *tensors: Tensor | None,
        mask: Tensor | None = None,
        scale: float,
        causal: bool = False,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        every = (*tensors, *(None,) * (8 - len(tensors)), mask) if len(tensors) < 9 else tensors
        result: tuple[Tensor, Tensor, Tensor] = _AttentionMoments.apply(*every, scale, causal, window, moments.name)
        return result

    return call


class _AttentionMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, scale, causal, window, name = inputs
        ctx.moments, ctx.settings = MOMENTS[name], (scale, causal, window)
        ctx.set_materialize_grads(False)
        lse, mean, covariance = ctx.moments.forward(*tensors, scale, causal, window)
        ctx.save_for_backward(*tensors, lse)
        return lse, mean, covariance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, output, turn, aim, tangent = ctx.moments.backward(*ctx.saved_tensors, *grads, *ctx.settings)
        return query, key, value, output, None, turn, aim, tangent, *(None,) * 5


BLOCK = 32
"""Queries of a block: small, since all keys up to the block's last query are multiplied with all its queries."""


@dataclass(frozen=True)
class Attends:
    """Which keys a query attends to, see `reference.attention_moments`; the mask is a tensor and travels alone."""

    causal: bool
    window: int | None

    def keys(self, first: int, last: int, columns: int) -> slice:
        """The keys that queries first…last − 1 may attend to, and what lies between."""
        low, high = 0, columns
        if self.window is not None:
            low = max(0, first - self.window + 1)
            high = min(columns, last + self.window - 1)
        return slice(low, min(last, columns) if self.causal else high)


@dataclass(frozen=True)
class Block:
    """Scores of some queries with the keys that they may attend to, all (B, K, G, rows, columns)."""

    rows: slice
    columns: slice
    raw: Tensor
    """scale q·k"""
    form: Tensor
    moved: Tensor
    """scale t·k; `raw` where there is no tangent"""
    added: Tensor | None
    """What is added to the raw scores; None for nothing."""


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    angle: Tensor,
    turn: Tensor,
    aim: Tensor,
    tangent: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, mean, covariance) of `reference.attention_moments`."""
    check_attention(query, key, value, output, angle, turn, aim, tangent, window)
    heads = _Heads(query, key, value, output, angle, turn, aim, tangent)
    shape, dtype = query.shape[:3], wide_dtype(query.dtype)
    lse, mean = (query.new_empty(shape, dtype=dtype) for _ in range(2))
    covariance = query.new_empty((*shape, value.shape[-1]))
    with full_precision(query):
        for block in heads.blocks(mask, scale, Attends(causal, window)):
            rows = block.rows
            scores = block.raw if block.added is None else block.raw + block.added
            own = torch.logsumexp(scores, -1)
            weights = _weights(scores, own)
            lse[:, :, rows] = own.flatten(1, 2)
            mean[:, :, rows] = (weights * block.form).sum(-1).flatten(1, 2)
            weights.mul_(block.moved)
            moved = heads.times(weights, heads.value[..., block.columns, :])
            moved.addcmul_(weights.sum(-1, keepdim=True), heads.rows("output", rows), value=-1)
            covariance[:, :, rows] = moved.flatten(1, 2)
    return lse, mean, covariance


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    angle: Tensor,
    turn: Tensor,
    aim: Tensor,
    tangent: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    grad_lse: Tensor | None,
    grad_mean: Tensor | None,
    grad_covariance: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value, output, turn, aim and tangent (None without one), each in its tensor's dtype."""
    heads = _Heads(query, key, value, output, angle, turn, aim, tangent)
    empty = query.new_zeros((), dtype=lse.dtype)
    grads = {
        "lse": empty.expand(lse.shape) if grad_lse is None else grad_lse,
        "mean": empty.expand(lse.shape) if grad_mean is None else grad_mean,
        "covariance": empty.expand(output.shape) if grad_covariance is None else grad_covariance,
    }
    per_row = {name: torch.empty_like(tensor) for name, tensor in (("query", query), ("output", output), ("aim", aim))}
    if tangent is not None:
        per_row["tangent"] = torch.empty_like(tangent)
    per_column = {name: torch.zeros_like(getattr(heads, name)) for name in ("key", "value", "turn")}
    with full_precision(query):
        for block in heads.blocks(mask, scale, Attends(causal, window)):
            rows, columns = block.rows, block.columns
            k, v = heads.key[..., columns, :], heads.value[..., columns, :]
            scores = block.raw if block.added is None else block.raw + block.added
            weights = _weights(scores, heads.split(lse[:, :, rows]))
            d_cov = heads.split(widen(grads["covariance"][:, :, rows]))
            d_mean, d_lse = (heads.split(widen(grads[name][:, :, rows])).unsqueeze(-1) for name in ("mean", "lse"))
            # Gradients of t (over the weight), of the weight, and of the score.
            gap = heads.products(d_cov, v) - (d_cov * heads.rows("output", rows)).sum(-1, keepdim=True)
            d_weight = torch.addcmul(block.form * d_mean, block.moved, gap)
            spread = weights * block.moved
            d_moved = gap.mul_(weights)
            d_score = (d_weight - (weights * d_weight).sum(-1, keepdim=True)).add_(d_lse).mul_(weights)
            d_form = weights.mul_(d_mean)
            q = heads.rows("query", rows)
            if tangent is None:
                d_score.add_(d_moved)
            else:
                per_row["tangent"][:, :, rows] = heads.times(d_moved, k).mul_(scale).flatten(1, 2)
                heads.gather(per_column["key"], columns, d_moved, heads.rows("tangent", rows), scale)
            per_row["query"][:, :, rows] = heads.times(d_score, k).mul_(scale).flatten(1, 2)
            per_row["aim"][:, :, rows] = heads.times(d_form, k).neg_().flatten(1, 2)
            per_row["output"][:, :, rows] = (spread.sum(-1, keepdim=True) * d_cov).neg_().flatten(1, 2)
            heads.gather(per_column["key"], columns, d_score, q, scale)
            heads.gather(per_column["key"], columns, d_form, heads.rows("aim", rows), -1.0)
            heads.gather(per_column["value"], columns, spread, d_cov, 1.0)
            per_column["turn"][..., columns, :] += d_form.mT @ heads.angle_rows(rows)
    return (
        per_row["query"],
        per_column["key"].to(key.dtype),
        per_column["value"].to(value.dtype),
        per_row["output"],
        per_column["turn"].flatten(1, 2).to(turn.dtype),
        per_row["aim"],
        per_row.get("tangent"),
    )


class _Heads:
    """The tensors of an attention in float32, query heads as (B, K, G) behind the key head that they share."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        angle: Tensor,
        turn: Tensor,
        aim: Tensor,
        tangent: Tensor | None,
    ) -> None:
        self.shared, self.groups = key.shape[1], query.shape[1] // key.shape[1]
        self._per_row = {"query": query, "output": output, "aim": aim, "tangent": tangent}
        self._angle = widen(angle)
        # Read once per block: products want them dense.
        self.key, self.value = (widen(x).contiguous() for x in (key, value))
        self.turn = self.split(widen(turn)).contiguous()

    def split(self, tensor: Tensor) -> Tensor:
        """(B, H, …) as (B, K, G, …)."""
        return tensor.unflatten(1, (self.shared, self.groups))

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of a tensor per query, (B, K, G, rows, ·)."""
        tensor = self._per_row[name]
        assert tensor is not None
        return self.split(widen(tensor[:, :, rows]))

    def angle_rows(self, rows: slice) -> Tensor:
        """(B or 1, 1, 1, rows, c)."""
        return self._angle[:, None, None, rows]

    def products(self, rows: Tensor, shared: Tensor) -> Tensor:
        """Every row with every key or value of its head: one product for all heads that share it."""
        return (rows.flatten(2, 3) @ shared.mT).unflatten(2, (self.groups, -1))

    def times(self, weights: Tensor, shared: Tensor) -> Tensor:
        """Weighted sums of keys or values, (B, K, G, rows, ·)."""
        return (weights.flatten(2, 3) @ shared).unflatten(2, (self.groups, -1))

    def gather(self, total: Tensor, columns: slice, weights: Tensor, rows: Tensor, factor: float) -> None:
        """Add factor · Σ weights rows over the rows and the heads that share a key to its total."""
        total[..., columns, :].add_(weights.flatten(2, 3).mT @ rows.flatten(2, 3), alpha=factor)

    def blocks(self, mask: Tensor | None, scale: float, attends: Attends) -> Iterator[Block]:
        """The blocks of all queries, in order."""
        query = self._per_row["query"]
        assert query is not None
        count, columns = query.shape[2], self.key.shape[2]
        for first in range(0, count, BLOCK):
            rows = slice(first, min(first + BLOCK, count))
            yield self._block(rows, attends.keys(rows.start, rows.stop, columns), mask, scale, attends)

    def _block(self, rows: slice, columns: slice, mask: Tensor | None, scale: float, attends: Attends) -> Block:
        key = self.key[..., columns, :]
        raw = self.products(self.rows("query", rows), key).mul_(scale)
        form = self.angle_rows(rows) @ self.turn[..., columns, :].mT
        form -= self.products(self.rows("aim", rows), key)
        moved = raw
        if self._per_row["tangent"] is not None:
            moved = self.products(self.rows("tangent", rows), key).mul_(scale)
        return Block(rows, columns, raw, form, moved, self._added(rows, columns, mask, attends, raw))

    def _added(self, rows: slice, columns: slice, mask: Tensor | None, attends: Attends, like: Tensor) -> Tensor | None:
        if mask is None and not attends.causal and attends.window is None:
            return None
        if mask is not None:
            mask = mask[(None,) * (4 - mask.dim())]
            mask = mask[:, :, rows] if mask.shape[2] > 1 else mask
            mask = mask[..., columns] if mask.shape[3] > 1 else mask
            mask = self.split(mask) if mask.shape[1] > 1 else mask.unsqueeze(2)
        sizes = rows.stop - rows.start, columns.stop - columns.start
        return bias(mask, *sizes, attends.causal, attends.window, like, rows.start - columns.start)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(score − lse); 0 for queries that attend to nothing, whose scores and lse are −inf."""
    return torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1))


BLOCKED = Moments("blocked", forward, backward)
