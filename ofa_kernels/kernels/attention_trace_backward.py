"""Gradients of what goes token by token in the trace of attention: before the sweeps, behind them, of the constants.

Arguments come in groups, and heads are taken apart, as in `kernels.attention_trace`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.attention_moments import head_of, load_rows, product, products, sequence_head_block
from ofa_kernels.kernels.attention_trace import (
    ANY_LENGTH,
    channels_of,
    load_angles,
    load_constant,
    load_part,
    load_shift,
    own_weight,
    store_part,
    tile_of,
    turn_shift,
    without_shift,
)
from ofa_kernels.kernels.tile import load, store


@triton.jit(do_not_specialize=ANY_LENGTH)
def attention_trace_backward_own(
    query,
    key,
    value,
    output,
    key_trace,
    value_trace,
    query_shift,
    key_shift,
    value_shift,
    cos,
    sin,
    mask,
    mask_sequence,
    mask_head,
    mask_own,
    lse,
    grad_tangent,
    grad_trace,
    grad_lse,
    grad_mean,
    grad_query,
    query_moved,
    own,
    sequences,
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
    """What the sweeps and the two kernels below start from; one program per block of rows and head.

        k' = k − R b_k,  v' = v − b_v,  g = scale a_ii D·(v − o)
        ∂lse = −a_ii (s (c_v + scale q·R m) + scale q·k' D·(v − o) + D·v'),  ∂mean = scale s
        h = scale a_ii s,  l = g − scale ∂lse,  ∂query = h R m + l k − g R b_k
        own = (a_ii, a_ii scale q·k', h, l),  query_moved = q − R b_q

    for D = grad_tangent, (B, H, T, VALUE), and s = grad_trace, (B, T). grad_lse and grad_mean are (B, H, T) and own is
    (4, B, H, T) in float32; grad_query, (B, H, T, HEAD), is for the sweep over the keys to add to. The shifts b, and
    query_moved with b_q, are as in the kernels of the forward pass, which leave it to be made again.
    """
    sequence, head, block = sequence_head_block(rows, heads, BLOCK_ROWS)
    STREAM: tl.constexpr = query[0].dtype.element_ty
    scale = tl.cast(scale, tl.float32)
    first = block * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    shared = head // groups
    numbers = (sequence * heads + head) * rows
    v = load_rows(value, sequence, shared, first, rows, tl.float32, BLOCK_ROWS, VALUE, VALUE_TILE)
    gap = v - load_rows(output, sequence, head, first, rows, tl.float32, BLOCK_ROWS, VALUE, VALUE_TILE)
    d = load_rows(grad_tangent, sequence, head, first, rows, tl.float32, BLOCK_ROWS, VALUE, VALUE_TILE)
    with_gap = tl.sum(d * gap, 1)
    with_value = tl.sum(d * without_shift(v, value_shift, shared, VALUE, VALUE_TILE), 1)
    score = tl.zeros((BLOCK_ROWS,), tl.float32)
    still = tl.zeros((BLOCK_ROWS,), tl.float32)
    match = tl.zeros((BLOCK_ROWS,), tl.float32)
    if PAIRS > 0:
        cosine, sine = load_angles(cos, sin, sequence, first, rows, PAIRS, BLOCK_ROWS)
        m_x = load_constant(key_trace, head, STREAM, 0, PAIRS, HEAD, INTERLEAVED, VALUE, VALUE_TILE)
        m_y = load_constant(key_trace, head, STREAM, 1, PAIRS, HEAD, INTERLEAVED, VALUE, VALUE_TILE)
        x, y = products(gap, m_x, STREAM, EMULATED), products(gap, m_y, STREAM, EMULATED)
        x, y = x * cosine - y * sine, y * cosine + x * sine
        q_x = load_part(query, sequence, head, first, rows, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        q_y = load_part(query, sequence, head, first, rows, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        k_x = load_part(key, sequence, shared, first, rows, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        k_y = load_part(key, sequence, shared, first, rows, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        score += tl.sum(q_x * k_x + q_y * k_y, 1)
        match += tl.sum(q_x * x + q_y * y, 1)
        if query_shift is not None:
            b_x, b_y = turn_shift(query_shift, head, cosine, sine, PAIRS, HEAD, INTERLEAVED)
            store_part(query_moved, sequence, head, first, rows, q_x - b_x, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
            store_part(query_moved, sequence, head, first, rows, q_y - b_y, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        if key_shift is not None:
            b_x, b_y = turn_shift(key_shift, shared, cosine, sine, PAIRS, HEAD, INTERLEAVED)
            still += tl.sum(q_x * b_x + q_y * b_y, 1)
    if HEAD > 2 * PAIRS:
        m = load_constant(key_trace, head, STREAM, 2, PAIRS, HEAD, INTERLEAVED, VALUE, VALUE_TILE)
        z = products(gap, m, STREAM, EMULATED)
        q = load_part(query, sequence, head, first, rows, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        k = load_part(key, sequence, shared, first, rows, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        score += tl.sum(q * k, 1)
        match += tl.sum(q * z, 1)
        if query_shift is not None:
            moved = q - load_shift(query_shift, head, 2, PAIRS, HEAD, INTERLEAVED)
            store_part(query_moved, sequence, head, first, rows, moved, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        if key_shift is not None:
            b = load_shift(key_shift, shared, 2, PAIRS, HEAD, INTERLEAVED)
            still += tl.sum(q * b, 1)
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
    along = score
    if key_shift is not None:
        along -= scale * still
    s = load(grad_trace + sequence * rows, row, inside)
    d_score = weight * (
        s * (tl.load(value_trace + head).to(tl.float32) + scale * match) + along * with_gap + with_value
    )
    to_match, to_score = scale * weight * s, scale * (weight * with_gap + d_score)
    store(grad_lse + numbers, row, inside, -d_score)
    store(grad_mean + numbers, row, inside, scale * s)
    stride = sequences.to(tl.int64) * heads * rows
    store(own + numbers, row, inside, weight)
    store(own + stride + numbers, row, inside, weight * along)
    store(own + 2 * stride + numbers, row, inside, to_match)
    store(own + 3 * stride + numbers, row, inside, to_score)
    to_match, to_score, to_along = to_match[:, None], to_score[:, None], (scale * weight * with_gap)[:, None]
    if PAIRS > 0:
        x, y = to_match * x + to_score * k_x, to_match * y + to_score * k_y
        if key_shift is not None:
            x, y = x - to_along * b_x, y - to_along * b_y
        store_part(grad_query, sequence, head, first, rows, x, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        store_part(grad_query, sequence, head, first, rows, y, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
    if HEAD > 2 * PAIRS:
        z = to_match * z + to_score * k
        if key_shift is not None:
            z -= to_along * b
        store_part(grad_query, sequence, head, first, rows, z, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)


@triton.jit(do_not_specialize=ANY_LENGTH)
def attention_trace_backward_tokens(
    query,
    key,
    value,
    query_trace,
    key_trace,
    cos,
    sin,
    grad_tangent,
    own,
    grad_turn,
    grad_aim,
    grad_key,
    grad_value,
    grad_output,
    sequences,
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
    """Adds to the gradients of the sweeps what does not go through them; one program per block of rows and head.

        u = R⁻¹ q,  w = M_q v,  z = R⁻¹ ∂aim,  (f, g, r) = ∂turn
        ∂m = h u,  ∂w = (f k_x + g k_y, f k_y − g k_x, r k_rest)
        ∂output += −a_ii t D + M_qᵀ z − M_kᵀ ∂m,  ∂value += a_ii (t + 1) D + M_qᵀ ∂w + M_kᵀ ∂m
        ∂key += l q + (f w_x − g w_y, f w_y + g w_x, r w_rest)

    with own = (a_ii, a_ii t, h, l), t = scale q·(k − R b). grad_key and grad_value have a head for each query head.
    """
    sequence, head, block = sequence_head_block(rows, heads, BLOCK_ROWS)
    STREAM: tl.constexpr = query[0].dtype.element_ty
    first = block * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    shared = head // groups
    numbers = own + (sequence * heads + head) * rows
    stride = sequences.to(tl.int64) * heads * rows
    to_match = load(numbers + 2 * stride, row, inside)[:, None]
    through_gap = tl.zeros((BLOCK_ROWS, VALUE_TILE), tl.float32)
    # One sum after the other, each reading again what all need: together they would not fit the registers.
    if PAIRS > 0:
        cosine, sine = load_angles(cos, sin, sequence, first, rows, PAIRS, BLOCK_ROWS)
        q_x = load_part(query, sequence, head, first, rows, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        q_y = load_part(query, sequence, head, first, rows, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        m_x = load_constant(key_trace, head, STREAM, 0, PAIRS, HEAD, INTERLEAVED, VALUE, VALUE_TILE)
        m_y = load_constant(key_trace, head, STREAM, 1, PAIRS, HEAD, INTERLEAVED, VALUE, VALUE_TILE)
        through_gap = product(to_match * (q_x * cosine + q_y * sine), m_x, through_gap, STREAM, EMULATED)
        through_gap = product(to_match * (q_y * cosine - q_x * sine), m_y, through_gap, STREAM, EMULATED)
    if HEAD > 2 * PAIRS:
        q = load_part(query, sequence, head, first, rows, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        m = load_constant(key_trace, head, STREAM, 2, PAIRS, HEAD, INTERLEAVED, VALUE, VALUE_TILE)
        through_gap = product(to_match * q, m, through_gap, STREAM, EMULATED)
    d_output = -through_gap
    if PAIRS > 0:
        m_x = load_constant(query_trace, head, STREAM, 0, PAIRS, HEAD, INTERLEAVED, VALUE, VALUE_TILE)
        m_y = load_constant(query_trace, head, STREAM, 1, PAIRS, HEAD, INTERLEAVED, VALUE, VALUE_TILE)
        x = load_part(grad_aim, sequence, head, first, rows, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        y = load_part(grad_aim, sequence, head, first, rows, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        d_output = product(x * cosine + y * sine, m_x, d_output, STREAM, EMULATED)
        d_output = product(y * cosine - x * sine, m_y, d_output, STREAM, EMULATED)
    if HEAD > 2 * PAIRS:
        m = load_constant(query_trace, head, STREAM, 2, PAIRS, HEAD, INTERLEAVED, VALUE, VALUE_TILE)
        x = load_part(grad_aim, sequence, head, first, rows, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        d_output = product(x, m, d_output, STREAM, EMULATED)
    along = load(numbers + stride, row, inside)[:, None]
    d = load_rows(grad_tangent, sequence, head, first, rows, tl.float32, BLOCK_ROWS, VALUE, VALUE_TILE)
    add_rows(grad_output, sequence, head, first, rows, d_output - along * d, VALUE, VALUE_TILE)
    d_value = through_gap
    if PAIRS > 0:
        f = load_part(grad_turn, sequence, head, first, rows, 0, PAIRS, HEAD, False, BLOCK_ROWS)
        g = load_part(grad_turn, sequence, head, first, rows, 1, PAIRS, HEAD, False, BLOCK_ROWS)
        x = load_part(key, sequence, shared, first, rows, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        y = load_part(key, sequence, shared, first, rows, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        d_value = product(f * x + g * y, m_x, d_value, STREAM, EMULATED)
        d_value = product(f * y - g * x, m_y, d_value, STREAM, EMULATED)
    if HEAD > 2 * PAIRS:
        at = row.to(tl.int64) * grad_turn[3] + 2 * PAIRS
        r = load(head_of(grad_turn, sequence, head), at, inside)[:, None]
        x = load_part(key, sequence, shared, first, rows, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        d_value = product(r * x, m, d_value, STREAM, EMULATED)
    along += load(numbers, row, inside)[:, None]
    d = load_rows(grad_tangent, sequence, head, first, rows, tl.float32, BLOCK_ROWS, VALUE, VALUE_TILE)
    add_rows(grad_value, sequence, head, first, rows, d_value + along * d, VALUE, VALUE_TILE)
    to_score = load(numbers + 3 * stride, row, inside)[:, None]
    v = load_rows(value, sequence, shared, first, rows, STREAM, BLOCK_ROWS, VALUE, VALUE_TILE)
    if PAIRS > 0:
        x, y = products(v, m_x, STREAM, EMULATED), products(v, m_y, STREAM, EMULATED)
        q_x = load_part(query, sequence, head, first, rows, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        d_x = load_part(grad_key, sequence, head, first, rows, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        d_x += to_score * q_x + f * x - g * y
        store_part(grad_key, sequence, head, first, rows, d_x, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        q_y = load_part(query, sequence, head, first, rows, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        d_y = load_part(grad_key, sequence, head, first, rows, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        d_y += to_score * q_y + f * y + g * x
        store_part(grad_key, sequence, head, first, rows, d_y, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
    if HEAD > 2 * PAIRS:
        d_x = load_part(grad_key, sequence, head, first, rows, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
        d_x += to_score * q + r * products(v, m, STREAM, EMULATED)
        store_part(grad_key, sequence, head, first, rows, d_x, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)


@triton.jit
def add_rows(tensor, sequence, head, first, rows, addend, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Add to rows that only this program writes."""
    row, column = tl.arange(0, addend.shape[0])[:, None], tl.arange(0, PADDED)[None, :]
    inside = (first + row < rows) & (column < WIDTH)
    start = head_of(tensor, sequence, head) + tl.cast(first, tl.int64) * tensor[3]
    at = row * tensor[3] + column
    store(start, at, inside, load(start, at, inside) + addend)


@triton.jit(do_not_specialize=ANY_LENGTH)
def attention_trace_backward_constants(
    query,
    key,
    value,
    output,
    cos,
    sin,
    own,
    grad_turn,
    grad_aim,
    partial,
    partial_value,
    sequences,
    rows,
    heads,
    groups,
    scale,
    EMULATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Gradients of M_q, M_k and c_v, summed over a run of blocks of rows; two programs per run and head.

        ∂M_q = Σ ∂w vᵀ + z oᵀ,  ∂M_k = Σ ∂m (v − o)ᵀ,  ∂c_v = Σ h/scale

    with the symbols of `attention_trace_backward_tokens`. A program has one of M_q, and M_k with c_v. The partial sums
    are (runs, 2, H, HEAD, VALUE) and (runs, H) in float32, each over its blocks in their order.
    """
    program = tl.program_id(0).to(tl.int64)
    head = program // 2 % heads
    run = program // 2 // heads
    runs = tl.num_programs(0) // (2 * heads)
    STREAM: tl.constexpr = query[0].dtype.element_ty
    scale = tl.cast(scale, tl.float32)
    shared = head // groups
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    share = tl.cdiv(sequences * blocks, runs)
    begin, end = run * share, tl.minimum((run + 1) * share, sequences * blocks)
    into = partial + (program % 2 * heads + run * 2 * heads + head) * HEAD * VALUE
    PAIR_TILE: tl.constexpr = tile_of(PAIRS)
    REST_TILE: tl.constexpr = tile_of(HEAD - 2 * PAIRS)
    sum_x = tl.zeros((PAIR_TILE, VALUE_TILE), tl.float32)
    sum_y = tl.zeros((PAIR_TILE, VALUE_TILE), tl.float32)
    sum_rest = tl.zeros((REST_TILE, VALUE_TILE), tl.float32)
    if program % 2 == 0:
        for block in range(begin, end):
            sequence, first = block // blocks, (block % blocks * BLOCK_ROWS).to(tl.int32)
            row = first + tl.arange(0, BLOCK_ROWS)
            v = load_rows(value, sequence, shared, first, rows, STREAM, BLOCK_ROWS, VALUE, VALUE_TILE)
            o = load_rows(output, sequence, head, first, rows, STREAM, BLOCK_ROWS, VALUE, VALUE_TILE)
            if PAIRS > 0:
                cosine, sine = load_angles(cos, sin, sequence, first, rows, PAIRS, BLOCK_ROWS)
                f = load_part(grad_turn, sequence, head, first, rows, 0, PAIRS, HEAD, False, BLOCK_ROWS)
                g = load_part(grad_turn, sequence, head, first, rows, 1, PAIRS, HEAD, False, BLOCK_ROWS)
                k_x = load_part(key, sequence, shared, first, rows, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
                k_y = load_part(key, sequence, shared, first, rows, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
                sum_x = product(tl.trans(f * k_x + g * k_y), v, sum_x, STREAM, EMULATED)
                sum_y = product(tl.trans(f * k_y - g * k_x), v, sum_y, STREAM, EMULATED)
                x = load_part(grad_aim, sequence, head, first, rows, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
                y = load_part(grad_aim, sequence, head, first, rows, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
                sum_x = product(tl.trans(x * cosine + y * sine), o, sum_x, STREAM, EMULATED)
                sum_y = product(tl.trans(y * cosine - x * sine), o, sum_y, STREAM, EMULATED)
            if HEAD > 2 * PAIRS:
                at = row.to(tl.int64) * grad_turn[3] + 2 * PAIRS
                r = load(head_of(grad_turn, sequence, head), at, row < rows)[:, None]
                k = load_part(key, sequence, shared, first, rows, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
                sum_rest = product(tl.trans(r * k), v, sum_rest, STREAM, EMULATED)
                z = load_part(grad_aim, sequence, head, first, rows, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
                sum_rest = product(tl.trans(z), o, sum_rest, STREAM, EMULATED)
        store_constant(into, sum_x, sum_y, sum_rest, PAIRS, HEAD, INTERLEAVED, VALUE, VALUE_TILE)
    else:
        total = 0.0
        for block in range(begin, end):
            sequence, first = block // blocks, (block % blocks * BLOCK_ROWS).to(tl.int32)
            row = first + tl.arange(0, BLOCK_ROWS)
            v = load_rows(value, sequence, shared, first, rows, tl.float32, BLOCK_ROWS, VALUE, VALUE_TILE)
            gap = v - load_rows(output, sequence, head, first, rows, tl.float32, BLOCK_ROWS, VALUE, VALUE_TILE)
            numbers = own + ((2 * sequences.to(tl.int64) + sequence) * heads + head) * rows
            to_match = load(numbers, row, row < rows)
            total += tl.sum(to_match)
            to_match = to_match[:, None]
            if PAIRS > 0:
                cosine, sine = load_angles(cos, sin, sequence, first, rows, PAIRS, BLOCK_ROWS)
                x = load_part(query, sequence, head, first, rows, 0, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
                y = load_part(query, sequence, head, first, rows, 1, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
                sum_x = product(tl.trans(to_match * (x * cosine + y * sine)), gap, sum_x, STREAM, EMULATED)
                sum_y = product(tl.trans(to_match * (y * cosine - x * sine)), gap, sum_y, STREAM, EMULATED)
            if HEAD > 2 * PAIRS:
                q = load_part(query, sequence, head, first, rows, 2, PAIRS, HEAD, INTERLEAVED, BLOCK_ROWS)
                sum_rest = product(tl.trans(to_match * q), gap, sum_rest, STREAM, EMULATED)
        store_constant(into, sum_x, sum_y, sum_rest, PAIRS, HEAD, INTERLEAVED, VALUE, VALUE_TILE)
        tl.store(partial_value + run * heads + head, total / scale)


@triton.jit
def store_constant(
    constant,
    x,
    y,
    rest,
    PAIRS: tl.constexpr,
    HEAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
):
    """Write rows x, y and rest of one head's constant."""
    column = tl.arange(0, VALUE_TILE)[None, :]
    if PAIRS > 0:
        channel, any_of = channels_of(0, PAIRS, HEAD, INTERLEAVED)
        store(constant, channel[:, None] * VALUE + column, any_of[:, None] & (column < VALUE), x)
        channel, any_of = channels_of(1, PAIRS, HEAD, INTERLEAVED)
        store(constant, channel[:, None] * VALUE + column, any_of[:, None] & (column < VALUE), y)
    if HEAD > 2 * PAIRS:
        channel, any_of = channels_of(2, PAIRS, HEAD, INTERLEAVED)
        store(constant, channel[:, None] * VALUE + column, any_of[:, None] & (column < VALUE), rest)
