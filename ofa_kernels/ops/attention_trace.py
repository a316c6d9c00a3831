"""`attention_trace` on a GPU: schema, shapes, autograd and launches; see `reference.attention_trace`.

In 16 bits, and where heads have no norms of their own, everything is a kernel; elsewhere the kernels of
`attention_moments` are at work inside of `fused.attention_trace`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofa_kernels import launch
from ofa_kernels.fused import attention_trace as fused
from ofa_kernels.fused.attention_moments import Moments
from ofa_kernels.ops import attention_moments as moments
from ofa_kernels.ops.launching import Derivative, library, multiprocessors, operation, start_by_names, target
from ofa_kernels.reference.attention_trace import HeadNorm, Rotary, check_attention_trace

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor output, Tensor query_trace, Tensor key_trace, Tensor value_trace, "
    "Tensor? query_shift, Tensor? key_shift, Tensor? value_shift, Tensor? mask, Tensor? cos, Tensor? sin"
)
_SETTINGS = "bool interleaved, float scale, bool causal, SymInt? window"

library.define(
    f"attention_trace({_INPUTS}, {_SETTINGS}) -> "
    "(Tensor tangent, Tensor trace, Tensor turn, Tensor aim, Tensor reverse, Tensor lse)"
)
library.define(
    f"attention_trace_backward({_INPUTS}, Tensor turn, Tensor aim, Tensor reverse, Tensor lse, Tensor? grad_tangent, "
    f"Tensor? grad_trace, {_SETTINGS}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_output, "
    "Tensor grad_query_trace, Tensor grad_key_trace, Tensor grad_value_trace)"
)

WIDEST_HEAD = 128
"""Channels of a head whose constants, four tiles of its width squared, fit a multiprocessor's shared memory."""

Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


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
    """As `reference.attention_trace`, without a matrix of all scores; differentiable once, not in mask and rotary.

    Products take their operands in the dtype of `query`, also those with M_q and M_k.

    Raises:
        ValueError: shapes that do not match.
        RuntimeError: a shift or the mask requires a gradient, which only the reference has.
    """
    given = query, key, value, output, query_trace, key_trace, value_trace
    shifts = query_shift, key_shift, value_shift
    if query_norm is not None or key_norm is not None or not _fits(query, value):
        return fused.attention_trace(
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
            moments=_KERNELS,
        )
    fused.refuse_gradients(query_shift=query_shift, key_shift=key_shift, value_shift=value_shift, mask=mask)
    check_attention_trace(*given, *shifts)
    turns = (None, None, False) if rotary is None else (rotary.cos, rotary.sin, rotary.interleaved)
    tangent, trace, *_ = call(*given, *shifts, mask, *turns, scale, causal, window)
    return tangent, trace


def _fits(query: Tensor, value: Tensor) -> bool:
    return query.element_size() == 2 and max(query.shape[-1], value.shape[-1]) <= WIDEST_HEAD


def forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels of the forward pass: (tangent, trace, and what the backward pass needs of it)."""
    from ofa_kernels.kernels.attention_trace import attention_trace_combine, attention_trace_features

    constants, shifts = (query_trace, key_trace, value_trace), (query_shift, key_shift, value_shift)
    tangent, _, turn, aim, reverse, lse = empty(query, key, value, output, *constants, *shifts, mask, cos, sin)
    tokens = _Tokens(query, key, value, output, *constants, *shifts, mask, cos, sin, interleaved, scale)
    moved = tokens.query_moved()
    tokens.add(turn=moments.rows_of(turn), aim=moments.rows_of(aim), reverse=moments.angles_of(reverse))
    tokens.over_rows(attention_trace_features)
    sweep = moments.Attention(query, key, value, output, reverse, turn, aim, moved, mask, scale, causal, window)
    mean, trace = torch.empty_like(lse), torch.empty_like(lse)
    sweep.forward(lse, mean, tangent)
    tokens.add(lse=lse, mean=mean, tangent=moments.rows_of(tangent), trace=trace)
    tokens.over_rows(attention_trace_combine)
    return tangent, trace.sum(1), turn, aim, reverse, lse


def empty(
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
    *more: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of the forward pass, unwritten; the tangent has tokens first, as models lay heads out for W_o."""
    (sequences, heads, rows, width), wide = query.shape, torch.float32
    features = _features(width, 0 if cos is None else cos.shape[-1])
    tangent = query.new_empty((sequences, rows, heads, value.shape[-1])).transpose(1, 2)
    turn, aim = query.new_empty((sequences, heads, rows, features)), query.new_empty(query.shape)
    reverse = query.new_empty((1 if cos is None else len(cos), rows, features))
    return (
        tangent,
        query.new_empty((sequences, rows), dtype=wide),
        turn,
        aim,
        reverse,
        query.new_empty((sequences, heads, rows), dtype=wide),
    )


def _features(width: int, pairs: int) -> int:
    """Two for each pair, and one for all channels that are not rotated."""
    return 2 * pairs + (width > 2 * pairs)


def backward(
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
    turn: Tensor,
    aim: Tensor,
    reverse: Tensor,
    lse: Tensor,
    grad_tangent: Tensor | None,
    grad_trace: Tensor | None,
    interleaved: bool,
    scale: float,
    causal: bool,
    window: int | None,
) -> Seven:
    """Launch the kernels of the backward pass: gradients of the four heads and of M_q, M_k and c_v."""
    from ofa_kernels.kernels.attention_trace_backward import (
        attention_trace_backward_constants,
        attention_trace_backward_own,
        attention_trace_backward_tokens,
    )

    constants, shifts = (query_trace, key_trace, value_trace), (query_shift, key_shift, value_shift)
    d_tangent = query.new_zeros(output.shape) if grad_tangent is None else grad_tangent.to(query.dtype)
    d_trace = lse.new_zeros(query.shape[0], query.shape[2]) if grad_trace is None else grad_trace.contiguous()
    tokens = _Tokens(query, key, value, output, *constants, *shifts, mask, cos, sin, interleaved, scale)
    moved = tokens.query_moved()
    own, to_lse, to_mean = lse.new_empty((4, *lse.shape)), torch.empty_like(lse), torch.empty_like(lse)
    d_query = moments.like(query)
    tokens.add(lse=lse, grad_tangent=moments.rows_of(d_tangent), grad_trace=d_trace, own=own)
    tokens.add(grad_lse=to_lse, grad_mean=to_mean, grad_query=moments.rows_of(d_query))
    tokens.over_rows(attention_trace_backward_own)
    sweep = moments.Attention(query, key, value, output, reverse, turn, aim, moved, mask, scale, causal, window)
    swept = sweep.backward(lse, to_lse, to_mean, d_tangent, own_query=d_query, tangent_follows=True)
    tokens.add(**{f"grad_{name}": moments.rows_of(grad) for name, grad in swept.items()})
    tokens.over_rows(attention_trace_backward_tokens)
    to_query, to_key, to_value = tokens.over_runs(attention_trace_backward_constants)
    return (
        swept["query"],
        moments.sum_of_groups(swept["key"], key),
        moments.sum_of_groups(swept["value"], value),
        swept["output"],
        to_query.to(query_trace.dtype),
        to_key.to(key_trace.dtype),
        to_value.to(value_trace.dtype),
    )


def empty_gradients(*given: Any) -> Seven:
    """The outputs of the backward pass, unwritten."""
    query, key, value, output, to_query, to_key, to_value = (moments.like(tensor) for tensor in given[:7])
    return query, key, value, output, to_query, to_key, to_value


class _Tokens:
    """What the kernels that go token by token are told, by the names of their arguments; each takes what it names."""

    def __init__(
        self,
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
    ) -> None:
        self._like, self._shape = query, (*query.shape[:3], query.shape[3], value.shape[3])
        self._shifted = any(shift is not None for shift in (query_shift, key_shift, value_shift))
        sequences, heads, rows, width, depth = self._shape
        spread = moments.spread(mask, (sequences, heads, rows, rows))
        strides = (0, 0, 0, 0) if spread is None else spread.stride()
        self._arguments: dict[str, Any] = {
            "query": moments.rows_of(query),
            "key": moments.rows_of(key),
            "value": moments.rows_of(value),
            "output": moments.rows_of(output),
            "query_trace": query_trace.contiguous(),
            "key_trace": key_trace.contiguous(),
            "value_trace": value_trace.contiguous(),
            "query_shift": None if query_shift is None else query_shift.contiguous(),
            "key_shift": None if key_shift is None else key_shift.contiguous(),
            "value_shift": None if value_shift is None else value_shift.contiguous(),
            "query_moved": None,
            "cos": None if cos is None else _turns(cos),
            "sin": None if sin is None else _turns(sin),
            "mask": spread,
            "mask_sequence": strides[0],
            "mask_head": strides[1],
            # A token's own entry is on the diagonal.
            "mask_own": strides[2] + strides[3],
            "sequences": sequences,
            "rows": rows,
            "heads": heads,
            "groups": heads // key.shape[1],
            "scale": scale,
        }
        self._constants = {
            "ADDITIVE": mask is not None and mask.dtype != torch.bool,
            "EMULATED": query.device.type == "cpu" and query.dtype == torch.bfloat16,
            "INTERLEAVED": interleaved,
            "PAIRS": 0 if cos is None else cos.shape[-1],
            "HEAD": width,
            "VALUE": depth,
            "VALUE_TILE": launch.tile_width(depth),
        }

    def add(self, **arguments: Any) -> None:
        """More arguments."""
        self._arguments |= arguments

    def query_moved(self) -> Tensor | None:
        """Room for the queries less their shift, None where they have none; the kernels write there from now on."""
        if self._arguments["query_shift"] is None:
            return None
        moved = torch.empty_like(self._like, memory_format=torch.contiguous_format)
        self.add(query_moved=moments.rows_of(moved))
        return moved

    def over_rows(self, kernel: Any) -> None:
        """Launch one program per block of rows and head."""
        sequences, heads, rows = self._shape[:3]
        config = self._configuration(kernel)
        self._start(kernel, config, sequences * heads * -(-rows // config.block_rows))

    def over_runs(self, kernel: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Launch two programs per head and run of blocks: sums of what they find for M_q, M_k and c_v."""
        sequences, heads, rows, width, depth = self._shape
        config = self._configuration(kernel)
        blocks = sequences * -(-rows // config.block_rows)
        runs = launch.attention_runs(blocks, heads, multiprocessors(self._like.device))
        partial = self._like.new_empty((runs, 2, heads, width, depth), dtype=torch.float32)
        values = self._like.new_empty((runs, heads), dtype=torch.float32)
        self.add(partial=partial, partial_value=values)
        if blocks * heads == 0:
            partial.zero_()
            values.zero_()
        else:
            self._start(kernel, config, 2 * heads * runs)
        to_query, to_key = partial.sum(0)
        return to_query, to_key, values.sum(0)

    def _start(self, kernel: Any, config: launch.AttentionLaunch, programs: int) -> None:
        start_by_names(kernel, programs, self._like, config, self._arguments, self._constants)

    def _configuration(self, kernel: Any) -> launch.AttentionLaunch:
        name, size = kernel.fn.__name__, self._like.element_size()
        return launch.configure_attention(name, max(self._shape[3:]), size, target(self._like), self._shifted)


def _turns(angle: Tensor) -> tuple[Tensor, int, int]:
    """Cos or sin, (B or 1, T, pairs), and the strides of a sequence, 0 if there is one for all, and of a row."""
    if angle.stride(-1) != 1:
        angle = angle.contiguous()
    return angle, angle.stride(0) if len(angle) > 1 else 0, angle.stride(1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.interleaved, ctx.scale, ctx.causal, ctx.window = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])


def _differentiate(ctx: Any, grad_tangent: Tensor | None, grad_trace: Tensor | None, *_: Any) -> tuple[Any, ...]:
    grads = call_backward(
        *ctx.saved_tensors, grad_tangent, grad_trace, ctx.interleaved, ctx.scale, ctx.causal, ctx.window
    )
    return *grads, *(None,) * 10


call_backward = operation("attention_trace_backward", backward, empty_gradients)
call = operation("attention_trace", forward, empty, Derivative(_save, _differentiate))


def _moments_forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = moments.call(*inputs)
    return result


def _moments_backward(*inputs: Any) -> tuple[Tensor | None, ...]:
    *grads, tangent = moments.call_backward(*inputs)
    # The operation has to return a tensor; without a tangent among the inputs it is empty.
    return *grads, None if inputs[7] is None else tangent


_KERNELS = Moments("kernels", _moments_forward, _moments_backward)
