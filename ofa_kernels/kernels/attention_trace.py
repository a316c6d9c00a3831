"""What a token's own key and value add to the trace of attention, and the features that the sweep over keys is given.

All of it is token by token: a head's rows in blocks, products with the head's constants M_q and M_k, and no sum over
other tokens but that of the constants' gradients. A head's channels are taken apart as a rotary embedding pairs them:
x and y of every pair, and the rest that is not rotated; without an embedding all channels are rest. Arguments come in
groups as in `kernels.attention_moments`; cos and sin are (pointer, strides of a sequence and of a row).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.attention_moments import finite, head_of, load_rows, products, sequence_head_block
from ofa_kernels.kernels.tile import load, store

ANY_LENGTH = (
    *("mask", "mask_sequence", "mask_head", "mask_own", "lse", "mean", "grad_trace", "grad_lse", "grad_mean"),
    *("own", "trace", "sequences", "rows", "heads"),
)
"""Arguments in which a sequence's length shows: the same binary serves all, where 16 divides it and elsewhere."""


@triton.jit
def channels_of(PART: tl.constexpr, PAIRS: tl.constexpr, HEAD: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Channels x (PART 0) or y (1) of all pairs, or the rest (2), and whether they are any: a tile's last dimension."""
    number = tl.arange(0, tile_of(HEAD - 2 * PAIRS if PART == 2 else PAIRS))
    if PART == 2:
        channel, any_of = 2 * PAIRS + number, 2 * PAIRS + number < HEAD
    elif INTERLEAVED:
        channel, any_of = 2 * number + PART, number < PAIRS
    else:
        channel, any_of = number + PART * PAIRS, number < PAIRS
    return channel, any_of


@triton.constexpr_function
def tile_of(count):
    """A power of two, and what a product takes at least."""
    return max(16, 1 << (max(count, 1) - 1).bit_length())


@triton.jit
def load_part(
    tensor,
    sequence,
    head,
    first,
    rows,
    PART: tl.constexpr,
    PAIRS: tl.constexpr,
    HEAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """x, y or rest of rows first…first + ROWS − 1 of a head in float32, 0 outside."""
    channel, any_of = channels_of(PART, PAIRS, HEAD, INTERLEAVED)
    row = tl.arange(0, ROWS)[:, None]
    start = head_of(tensor, sequence, head) + tl.cast(first, tl.int64) * tensor[3]
    return load(start, row * tensor[3] + channel[None, :], (first + row < rows) & any_of[None, :])


@triton.jit
def store_part(
    tensor,
    sequence,
    head,
    first,
    rows,
    values,
    PART: tl.constexpr,
    PAIRS: tl.constexpr,
    HEAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write what `load_part` would read."""
    channel, any_of = channels_of(PART, PAIRS, HEAD, INTERLEAVED)
    row = tl.arange(0, ROWS)[:, None]
    start = head_of(tensor, sequence, head) + tl.cast(first, tl.int64) * tensor[3]
    store(start, row * tensor[3] + channel[None, :], (first + row < rows) & any_of[None, :], values)


@triton.jit
def load_constant(
    constant,
    head,
    STREAM: tl.constexpr,
    PART: tl.constexpr,
    PAIRS: tl.constexpr,
    HEAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
):
    """Rows x, y or rest of M_q or M_k of a head, (channels, VALUE_TILE), as operands of products."""
    channel, any_of = channels_of(PART, PAIRS, HEAD, INTERLEAVED)
    column = tl.arange(0, VALUE_TILE)[None, :]
    inside = any_of[:, None] & (column < VALUE)
    return load(constant + head * HEAD * VALUE, channel[:, None] * VALUE + column, inside).to(STREAM)


@triton.jit
def load_angles(cos, sin, sequence, first, rows, PAIRS: tl.constexpr, ROWS: tl.constexpr):
    """Cos θ and sin θ of every pair of some rows; what is outside is not turned."""
    row, pair = tl.arange(0, ROWS)[:, None], tl.arange(0, tile_of(PAIRS))[None, :]
    inside = (first + row < rows) & (pair < PAIRS)
    cosine = load(cos[0] + sequence * cos[1] + tl.cast(first, tl.int64) * cos[2], row * cos[2] + pair, inside)
    sine = load(sin[0] + sequence * sin[1] + tl.cast(first, tl.int64) * sin[2], row * sin[2] + pair, inside)
    return tl.where(inside, cosine, 1.0), sine


@triton.jit
def load_shift(shift, head, PART: tl.constexpr, PAIRS: tl.constexpr, HEAD: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Channels x, y or rest of a head's shift b, the same for every row: (1, channels) in float32."""
    channel, any_of = channels_of(PART, PAIRS, HEAD, INTERLEAVED)
    return load(shift + head * HEAD, channel[None, :], any_of[None, :])


@triton.jit
def turn_shift(shift, head, cosine, sine, PAIRS: tl.constexpr, HEAD: tl.constexpr, INTERLEAVED: tl.constexpr):
    """R b for some rows, whose angles are given: channels x and y."""
    x = load_shift(shift, head, 0, PAIRS, HEAD, INTERLEAVED)
    y = load_shift(shift, head, 1, PAIRS, HEAD, INTERLEAVED)
    return x * cosine - y * sine, y * cosine + x * sine


@triton.jit
def without_shift(rows, shift, head, VALUE: tl.constexpr, VALUE_TILE: tl.constexpr):
    """Rows of values less their head's shift, or as they are where there is none."""
    if shift is not None:
        column = tl.arange(0, VALUE_TILE)[None, :]
        rows -= load(shift + head * VALUE, column, column < VALUE)
    return rows


@triton.jit
def own_weight(
    score,
    mask,
    mask_sequence,
    mask_head,
    mask_own,
    sequence,
    head,
    first,
    rows,
    lse,
    heads,
    ADDITIVE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """a_ii from scale q_i·k_i; 0 where the mask forbids a token itself. From one token to the next it is `mask_own`."""
    row = first + tl.arange(0, ROWS)
    inside = row < rows
    if mask is not None:
        at = sequence * mask_sequence + head * mask_head + row.to(tl.int64) * mask_own
        given = load(mask, at, inside)
        if ADDITIVE:
            score += given
        else:
            score = tl.where(given != 0, score, float("-inf"))
    total = load(lse + (sequence * heads + head) * rows, row, inside)
    return tl.where(inside, tl.exp(score - finite(total)), 0.0)


@triton.jit(do_not_specialize=ANY_LENGTH)
def attention_trace_features(
    query,
    key,
    value,
    output,
    query_trace,
    query_shift,
    cos,
    sin,
    turn,
    aim,
    reverse,
    query_moved,
    rows,
    heads,
    groups,
    EMULATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """What the sweep over the keys takes besides, as `reference.features`; one program per block of rows and head.

        w = M_q v,  turn = (k_x w_x + k_y w_y, k_y w_x − k_x w_y, k_rest·w_rest),  aim = R M_q o
        reverse = −(cos θ, sin θ, 1),  query_moved = q − R b

    The last feature only where channels are not rotated. turn (B, H, T, features), aim (B, H, T, HEAD) and reverse
    (B or 1, T, features), written by the programs of the first head; reverse[1] is 0 where all sequences share it.
    query_shift = b, (H, HEAD), and query_moved, (B, H, T, HEAD), or None.
    """
    sequence, head, block = sequence_head_block(rows, heads, BLOCK_ROWS)
    STREAM: tl.constexpr = key[0].dtype.element_ty
    first = block * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    shared = head // groups
    writes_angles = (head == 0) & ((sequence == 0) | (reverse[1] != 0))
    v = load_rows(value, sequence, shared, first, rows, STREAM, BLOCK_ROWS, VALUE, VALUE_TILE)
    o = load_rows(output, sequence, head, first, rows, STREAM, BLOCK_ROWS, VALUE, VALUE_TILE)
    if PAIRS > 0:
        cosine, sine = load_angles(cos, sin, sequence, first, rows, PAIRS, BLOCK_ROWS)
        m_x = load_constant(query_trace, head, STREAM, 0, PAIRS, HEAD, INTERLEAVED, VALUE, VALUE_TILE)
        m_y = load_constant(query_trace, head, STREAM, 1, PAIRS, HEAD, INTERLEAVED, VALUE, VALUE_TILE)
        k_x = load_part(key, sequence, shared, first, rows, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        k_y = load_part(key, sequence, shared, first, rows, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        w_x, w_y = products(v, m_x, STREAM, EMULATED), products(v, m_y, STREAM, EMULATED)
        # Features are stored one kind behind the other, whatever the order of the channels.
        store_part(turn, sequence, head, first, rows, k_x * w_x + k_y * w_y, 0, PAIRS, HEAD, False, BLOCK_ROWS)
        store_part(turn, sequence, head, first, rows, k_y * w_x - k_x * w_y, 1, PAIRS, HEAD, False, BLOCK_ROWS)
        y_x, y_y = products(o, m_x, STREAM, EMULATED), products(o, m_y, STREAM, EMULATED)
        store_part(aim, sequence, head, first, rows, y_x * cosine - y_y * sine, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        store_part(aim, sequence, head, first, rows, y_y * cosine + y_x * sine, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        if writes_angles:
            store_part(reverse, sequence, head, first, rows, -cosine, 0, PAIRS, HEAD, False, BLOCK_ROWS)
            store_part(reverse, sequence, head, first, rows, -sine, 1, PAIRS, HEAD, False, BLOCK_ROWS)
        if query_shift is not None:
            q_x = load_part(query, sequence, head, first, rows, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
            q_y = load_part(query, sequence, head, first, rows, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
            b_x, b_y = turn_shift(query_shift, head, cosine, sine, PAIRS, HEAD, INTERLEAVED)
            store_part(query_moved, sequence, head, first, rows, q_x - b_x, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
            store_part(query_moved, sequence, head, first, rows, q_y - b_y, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
    if HEAD > 2 * PAIRS:
        m = load_constant(query_trace, head, STREAM, 2, PAIRS, HEAD, INTERLEAVED, VALUE, VALUE_TILE)
        k = load_part(key, sequence, shared, first, rows, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        flat = tl.sum(k * products(v, m, STREAM, EMULATED), 1)
        at = row.to(tl.int64) * turn[3] + 2 * PAIRS
        store(head_of(turn, sequence, head), at, row < rows, flat)
        y = products(o, m, STREAM, EMULATED)
        store_part(aim, sequence, head, first, rows, y, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        if writes_angles:
            at = row.to(tl.int64) * reverse[3] + 2 * PAIRS
            store(head_of(reverse, sequence, head), at, row < rows, tl.full((BLOCK_ROWS,), -1.0, tl.float32))
        if query_shift is not None:
            q = load_part(query, sequence, head, first, rows, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
            q -= load_shift(query_shift, head, 2, PAIRS, HEAD, INTERLEAVED)
            store_part(query_moved, sequence, head, first, rows, q, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)


@triton.jit(do_not_specialize=ANY_LENGTH)
def attention_trace_combine(
    query,
    key,
    value,
    output,
    key_trace,
    value_trace,
    key_shift,
    value_shift,
    cos,
    sin,
    mask,
    mask_sequence,
    mask_head,
    mask_own,
    lse,
    mean,
    tangent,
    trace,
    rows,
    heads,
    groups,
    scale,
    ADDITIVE: tl.constexpr,
    EMULATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Tangent and trace of every head from the moments, as `reference.combine`; one program per block of rows and head.

        m = M_k (v_i − o_i),  a_ii = exp(scale q·k + mask − lse)
        trace = a_ii (c_v + scale q·R m) + scale mean,  tangent += a_ii (scale q·(k − R b) (v − o) + v − b')

    tangent, (B, H, T, VALUE), holds the covariance and is written to; trace is (B, H, T) in float32. key_shift = b,
    (heads of keys, HEAD), and value_shift = b', (heads of keys, VALUE), or None for 0.
    """
    sequence, head, block = sequence_head_block(rows, heads, BLOCK_ROWS)
    STREAM: tl.constexpr = query[0].dtype.element_ty
    scale = tl.cast(scale, tl.float32)
    first = block * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    numbers = (sequence * heads + head) * rows
    v = load_rows(value, sequence, head // groups, first, rows, tl.float32, BLOCK_ROWS, VALUE, VALUE_TILE)
    gap = v - load_rows(output, sequence, head, first, rows, tl.float32, BLOCK_ROWS, VALUE, VALUE_TILE)
    shared = head // groups
    score = tl.zeros((BLOCK_ROWS,), tl.float32)
    still = tl.zeros((BLOCK_ROWS,), tl.float32)
    match = tl.zeros((BLOCK_ROWS,), tl.float32)
    if PAIRS > 0:
        cosine, sine = load_angles(cos, sin, sequence, first, rows, PAIRS, BLOCK_ROWS)
        q_x = load_part(query, sequence, head, first, rows, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        q_y = load_part(query, sequence, head, first, rows, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        k_x = load_part(key, sequence, shared, first, rows, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        k_y = load_part(key, sequence, shared, first, rows, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        score += tl.sum(q_x * k_x + q_y * k_y, 1)
        # q·R m is R⁻¹q·m, and q·R b is R⁻¹q·b.
        m = load_constant(key_trace, head, STREAM, 0, PAIRS, HEAD, INTERLEAVED, VALUE, VALUE_TILE)
        u = q_x * cosine + q_y * sine
        match += tl.sum(u * products(gap, m, STREAM, EMULATED), 1)
        if key_shift is not None:
            still += tl.sum(u * load_shift(key_shift, shared, 0, PAIRS, HEAD, INTERLEAVED), 1)
        m = load_constant(key_trace, head, STREAM, 1, PAIRS, HEAD, INTERLEAVED, VALUE, VALUE_TILE)
        u = q_y * cosine - q_x * sine
        match += tl.sum(u * products(gap, m, STREAM, EMULATED), 1)
        if key_shift is not None:
            still += tl.sum(u * load_shift(key_shift, shared, 1, PAIRS, HEAD, INTERLEAVED), 1)
    if HEAD > 2 * PAIRS:
        q = load_part(query, sequence, head, first, rows, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        k = load_part(key, sequence, shared, first, rows, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        score += tl.sum(q * k, 1)
        if key_shift is not None:
            still += tl.sum(q * load_shift(key_shift, shared, 2, PAIRS, HEAD, INTERLEAVED), 1)
        m = load_constant(key_trace, head, STREAM, 2, PAIRS, HEAD, INTERLEAVED, VALUE, VALUE_TILE)
        match += tl.sum(q * products(gap, m, STREAM, EMULATED), 1)
    score *= scale
    weight = own_weight(
        score,
        mask,
        mask_sequence,
        mask_head,
        mask_own,
        sequence,
        head,
        first,
        rows,
        lse,
        heads,
        ADDITIVE,
        BLOCK_ROWS,
    )
    own = weight * (tl.load(value_trace + head).to(tl.float32) + scale * match)
    store(trace + numbers, row, row < rows, own + scale * load(mean + numbers, row, row < rows))
    column = tl.arange(0, VALUE_TILE)[None, :]
    at, inside = (row.to(tl.int64) * tangent[3])[:, None] + column, (row < rows)[:, None] & (column < VALUE)
    start = head_of(tangent, sequence, head)
    along = score
    if key_shift is not None:
        along -= scale * still
    value_moved = without_shift(v, value_shift, shared, VALUE, VALUE_TILE)
    moved = load(start, at, inside) + weight[:, None] * (along[:, None] * gap + value_moved)
    store(start, at, inside, moved)
