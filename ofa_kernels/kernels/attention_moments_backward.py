"""Gradients of the moments of the attention weights: a sweep over the keys of each query, two over a key's queries.

All three make the weights again from the scores and lse, and none adds to what another program writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.attention_moments import (
    ANY_LENGTH,
    LOG2_E,
    finite,
    keys_of,
    load_rows,
    masked,
    product,
    products,
    sequence_head_block,
    store_rows,
)
from ofa_kernels.kernels.tile import load, store


@triton.jit
def queries_of(first, rows, columns, window, CAUSAL: tl.constexpr, COLUMNS: tl.constexpr):
    """The first query that may attend to any of keys first…first + COLUMNS − 1, and the end of them."""
    low, high = 0, rows
    last = tl.minimum(first + COLUMNS, columns)
    if window is not None:
        low = tl.maximum(first - window + 1, 0)
        high = tl.minimum(last + window - 1, rows)
    if CAUSAL:
        low = first
    return low, high


@triton.jit
def queries_of_some(low, high, CAUSAL: tl.constexpr, PLAIN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The end of the blocks of queries, from `low` on, of which one may not attend to all keys of a block."""
    end = high
    if PLAIN:
        end = low
        if CAUSAL:
            end = tl.minimum(low + (COLUMNS + ROWS - 1) // ROWS * ROWS, high)
    return end


@triton.jit(do_not_specialize=ANY_LENGTH)
def attention_moments_backward_rows(
    query,
    key,
    value,
    output,
    reverse,
    turn,
    aim,
    tangent,
    mask,
    mask_sequence,
    mask_head,
    mask_query,
    mask_key,
    lse,
    grad_lse,
    grad_mean,
    grad_covariance,
    own_query,
    grad_query,
    grad_output,
    grad_aim,
    grad_tangent,
    pull,
    offset,
    rows,
    columns,
    heads,
    groups,
    window,
    scale,
    CAUSAL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    PER_QUERY: tl.constexpr,
    EMULATED: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    TURN: tl.constexpr,
    TURN_TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Gradients of query, output, aim and tangent; one program per block of queries.

        a_ij = e^(s_ij − lse_i),  f_ij = angle_i·turn_j − aim_i·k_j,  t_ij = scale (tangent_i or q_i)·k_j
        g_ij = D_i·v_j − D_i·o_i,  b_ij = w_i f_ij + t_ij g_ij,  p_i = Σ a_ij b_ij − ℓ_i
        ∂tangent_i = scale Σ a_ij g_ij k_j
        ∂query_i = scale (Σ a_ij b_ij k_j − p_i Σ a_ij k_j), and ∂tangent_i as well if grad_tangent is None
        ∂aim_i = −w_i Σ a_ij k_j,  ∂output_i = −D_i Σ a_ij t_ij

    for ℓ, w, D = grad_lse, grad_mean, grad_covariance, each of which may be None. Arguments as those of the forward
    kernel, the gradients as what they belong to. grad_tangent is None where the tangent is the query, or moves as it
    does. own_query (or None) is added to ∂query, whose memory it may be.
    pull = p and offset = D·o (None without D), numbers of each query in float32, are written for the sweeps over the
    queries of a key.
    """
    sequence, head, block = sequence_head_block(rows, heads, BLOCK_ROWS)
    STREAM: tl.constexpr = query[0].dtype.element_ty
    scale = tl.cast(scale, tl.float32)
    numbers = (sequence * heads + head) * rows
    first = (tl.cdiv(rows, BLOCK_ROWS) - 1 - block) * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    q = load_rows(query, sequence, head, first, rows, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
    above = LOG2_E * finite(load(lse + numbers, row, row < rows))
    w = tl.zeros((BLOCK_ROWS,), tl.float32)
    if grad_mean is not None:
        w = load(grad_mean + numbers, row, row < rows)
        aims = load_rows(aim, sequence, head, first, rows, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
        back = load_rows(reverse, sequence, head, first, rows, STREAM, BLOCK_ROWS, TURN, TURN_TILE)
    if grad_covariance is not None:
        d = load_rows(grad_covariance, sequence, head, first, rows, STREAM, BLOCK_ROWS, VALUE, VALUE_TILE)
        o = load_rows(output, sequence, head, first, rows, tl.float32, BLOCK_ROWS, VALUE, VALUE_TILE)
        d_dot_o = tl.sum(d.to(tl.float32) * o, 1)
        store(offset + numbers, row, row < rows, d_dot_o)
        if tangent is not None:
            t = load_rows(tangent, sequence, head, first, rows, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
        if grad_tangent is not None:
            turned = tl.zeros((BLOCK_ROWS, HEAD_TILE), tl.float32)
    p = tl.zeros((BLOCK_ROWS,), tl.float32)
    moved_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    pushed = tl.zeros((BLOCK_ROWS, HEAD_TILE), tl.float32)
    average = tl.zeros((BLOCK_ROWS, HEAD_TILE), tl.float32)
    low, high = keys_of(first, rows, columns, window, CAUSAL, BLOCK_ROWS)
    for start in range(low, high, BLOCK_COLUMNS):
        k = load_rows(key, sequence, head // groups, start, columns, STREAM, BLOCK_COLUMNS, HEAD, HEAD_TILE)
        raw = products(q, k, STREAM, EMULATED)
        score = raw * (scale * LOG2_E)
        score = masked(
            score,
            row[:, None],
            start + tl.arange(0, BLOCK_COLUMNS)[None, :],
            rows,
            columns,
            sequence,
            head,
            mask,
            mask_sequence,
            mask_head,
            mask_query,
            mask_key,
            window,
            CAUSAL,
            ADDITIVE,
            PER_QUERY,
        )
        weight = tl.exp2(score - above[:, None])
        b = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        if grad_mean is not None:
            turns = load_rows(turn, sequence, head, start, columns, STREAM, BLOCK_COLUMNS, TURN, TURN_TILE)
            against = product(aims, tl.trans(k), products(back, turns, STREAM, EMULATED), STREAM, EMULATED)
            b -= w[:, None] * against
        if grad_covariance is not None:
            v = load_rows(value, sequence, head // groups, start, columns, STREAM, BLOCK_COLUMNS, VALUE, VALUE_TILE)
            gap = scale * (products(d, v, STREAM, EMULATED) - d_dot_o[:, None])
            moved = raw
            if tangent is not None:
                moved = products(t, k, STREAM, EMULATED)
            if grad_tangent is not None:
                turned = product(weight * gap, k, turned, STREAM, EMULATED)
            b += moved * gap
            moved_sum += tl.sum(weight * moved, 1)
        p += tl.sum(weight * b, 1)
        b *= scale
        if grad_covariance is not None and grad_tangent is None:
            b += gap
        pushed = product(weight * b, k, pushed, STREAM, EMULATED)
        average = product(weight, k, average, STREAM, EMULATED)
    if grad_lse is not None:
        p -= load(grad_lse + numbers, row, row < rows)
    store(pull + numbers, row, row < rows, p)
    pushed -= (scale * p)[:, None] * average
    if own_query is not None:
        pushed += load_rows(own_query, sequence, head, first, rows, tl.float32, BLOCK_ROWS, HEAD, HEAD_TILE)
    store_rows(grad_query, sequence, head, first, rows, pushed, BLOCK_ROWS, HEAD, HEAD_TILE)
    store_rows(grad_aim, sequence, head, first, rows, -w[:, None] * average, BLOCK_ROWS, HEAD, HEAD_TILE)
    d_output = tl.zeros((BLOCK_ROWS, VALUE_TILE), tl.float32)
    d_tangent = tl.zeros((BLOCK_ROWS, HEAD_TILE), tl.float32)
    if grad_covariance is not None:
        # Read once more, rather than kept in registers during the sweep.
        d = load_rows(grad_covariance, sequence, head, first, rows, STREAM, BLOCK_ROWS, VALUE, VALUE_TILE)
        d_output = (-scale * moved_sum)[:, None] * d.to(tl.float32)
        if grad_tangent is not None:
            d_tangent = turned
    store_rows(grad_output, sequence, head, first, rows, d_output, BLOCK_ROWS, VALUE, VALUE_TILE)
    if grad_tangent is not None:
        store_rows(grad_tangent, sequence, head, first, rows, d_tangent, BLOCK_ROWS, HEAD, HEAD_TILE)


@triton.jit(do_not_specialize=ANY_LENGTH)
def attention_moments_backward_keys(
    query,
    key,
    value,
    reverse,
    turn,
    aim,
    tangent,
    mask,
    mask_sequence,
    mask_head,
    mask_query,
    mask_key,
    lse,
    grad_mean,
    grad_covariance,
    pull,
    offset,
    grad_key,
    rows,
    columns,
    heads,
    groups,
    window,
    scale,
    CAUSAL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    PER_QUERY: tl.constexpr,
    EMULATED: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    TURN: tl.constexpr,
    TURN_TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Gradient of key, for each query head that it serves; one program per block of keys and query head.

        ∂key_j = Σ_i scale a_ij (b_ij − p_i) q_i + scale a_ij g_ij (tangent_i or q_i) − a_ij w_i aim_i

    with the symbols of the sweep over the queries, whose pull = p and offset = D·o are read here. Tiles are
    (keys, queries), as the products that follow want them. grad_key has `heads` heads.
    """
    sequence, head, block = sequence_head_block(columns, heads, BLOCK_COLUMNS)
    STREAM: tl.constexpr = query[0].dtype.element_ty
    scale = tl.cast(scale, tl.float32)
    numbers = (sequence * heads + head) * rows
    first = block * BLOCK_COLUMNS
    column = first + tl.arange(0, BLOCK_COLUMNS)
    k = load_rows(key, sequence, head // groups, first, columns, STREAM, BLOCK_COLUMNS, HEAD, HEAD_TILE)
    if grad_mean is not None:
        turns = load_rows(turn, sequence, head, first, columns, STREAM, BLOCK_COLUMNS, TURN, TURN_TILE)
    if grad_covariance is not None:
        v = load_rows(value, sequence, head // groups, first, columns, STREAM, BLOCK_COLUMNS, VALUE, VALUE_TILE)
    # −∂key: the sign of aim's part costs nothing in the factor of the others.
    away = tl.zeros((BLOCK_COLUMNS, HEAD_TILE), tl.float32)
    low, high = queries_of(first, rows, columns, window, CAUSAL, BLOCK_COLUMNS)
    for start in range(low, high, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        q = load_rows(query, sequence, head, start, rows, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
        raw = products(k, q, STREAM, EMULATED)
        score = raw * (scale * LOG2_E)
        score = masked(
            score,
            row[None, :],
            column[:, None],
            rows,
            columns,
            sequence,
            head,
            mask,
            mask_sequence,
            mask_head,
            mask_query,
            mask_key,
            window,
            CAUSAL,
            ADDITIVE,
            PER_QUERY,
        )
        weight = tl.exp2(score - LOG2_E * finite(load(lse + numbers, row, row < rows))[None, :])
        b = -load(pull + numbers, row, row < rows)[None, :]
        if grad_mean is not None:
            aims = load_rows(aim, sequence, head, start, rows, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
            back = load_rows(reverse, sequence, head, start, rows, STREAM, BLOCK_ROWS, TURN, TURN_TILE)
            w = load(grad_mean + numbers, row, row < rows)[None, :]
            against = product(k, tl.trans(aims), products(turns, back, STREAM, EMULATED), STREAM, EMULATED)
            b -= w * against
            away = product(weight * w, aims, away, STREAM, EMULATED)
        if grad_covariance is not None:
            d = load_rows(grad_covariance, sequence, head, start, rows, STREAM, BLOCK_ROWS, VALUE, VALUE_TILE)
            gap = products(v, d, STREAM, EMULATED) - load(offset + numbers, row, row < rows)[None, :]
            if tangent is not None:
                t = load_rows(tangent, sequence, head, start, rows, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
                b += scale * products(k, t, STREAM, EMULATED) * gap
                away = product(weight * (-scale * gap), t, away, STREAM, EMULATED)
            else:
                b += (scale * raw + 1.0) * gap
        away = product(weight * (-scale * b), q, away, STREAM, EMULATED)
    store_rows(grad_key, sequence, head, first, columns, -away, BLOCK_COLUMNS, HEAD, HEAD_TILE)


@triton.jit(do_not_specialize=ANY_LENGTH)
def attention_moments_backward_values(
    query,
    key,
    reverse,
    tangent,
    mask,
    mask_sequence,
    mask_head,
    mask_query,
    mask_key,
    lse,
    grad_mean,
    grad_covariance,
    grad_value,
    grad_turn,
    rows,
    columns,
    heads,
    groups,
    window,
    scale,
    CAUSAL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    PER_QUERY: tl.constexpr,
    EMULATED: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    TURN: tl.constexpr,
    TURN_TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Gradients of value, for each query head that it serves, and of turn; one program per block of keys and head.

        ∂value_j = Σ_i a_ij t_ij D_i,  ∂turn_j = Σ_i a_ij w_i angle_i

    apart from the sweep above, because a third sum as wide as a head would have that one spill registers. It costs the
    scores once more, one of the fifteen products of the backward pass. grad_value has `heads` heads.
    """
    sequence, head, block = sequence_head_block(columns, heads, BLOCK_COLUMNS)
    STREAM: tl.constexpr = query[0].dtype.element_ty
    scale = tl.cast(scale, tl.float32)
    numbers = (sequence * heads + head) * rows
    first = block * BLOCK_COLUMNS
    column = first + tl.arange(0, BLOCK_COLUMNS)
    k = load_rows(key, sequence, head // groups, first, columns, STREAM, BLOCK_COLUMNS, HEAD, HEAD_TILE)
    d_value = tl.zeros((BLOCK_COLUMNS, VALUE_TILE), tl.float32)
    d_turn = tl.zeros((BLOCK_COLUMNS, TURN_TILE), tl.float32)
    PLAIN: tl.constexpr = mask is None and window is None
    low, high = queries_of(first, rows, columns, window, CAUSAL, BLOCK_COLUMNS)
    middle = queries_of_some(low, high, CAUSAL, PLAIN, BLOCK_ROWS, BLOCK_COLUMNS)
    for CLEAR in tl.static_range(1 if PLAIN and not CAUSAL else 0, 2 if PLAIN else 1):
        for start in range(middle if CLEAR else low, high if CLEAR else middle, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            q = load_rows(query, sequence, head, start, rows, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
            raw = products(k, q, STREAM, EMULATED)
            score = raw * (scale * LOG2_E)
            if not CLEAR:
                score = masked(
                    score,
                    row[None, :],
                    column[:, None],
                    rows,
                    columns,
                    sequence,
                    head,
                    mask,
                    mask_sequence,
                    mask_head,
                    mask_query,
                    mask_key,
                    window,
                    CAUSAL,
                    ADDITIVE,
                    PER_QUERY,
                )
            weight = tl.exp2(score - LOG2_E * finite(load(lse + numbers, row, row < rows))[None, :])
            if grad_covariance is not None:
                d = load_rows(grad_covariance, sequence, head, start, rows, STREAM, BLOCK_ROWS, VALUE, VALUE_TILE)
                moved = raw
                if tangent is not None:
                    t = load_rows(tangent, sequence, head, start, rows, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
                    moved = products(k, t, STREAM, EMULATED)
                d_value = product(weight * (scale * moved), d, d_value, STREAM, EMULATED)
            if grad_mean is not None:
                back = load_rows(reverse, sequence, head, start, rows, STREAM, BLOCK_ROWS, TURN, TURN_TILE)
                w = load(grad_mean + numbers, row, row < rows)[None, :]
                d_turn = product(weight * -w, back, d_turn, STREAM, EMULATED)
    store_rows(grad_value, sequence, head, first, columns, d_value, BLOCK_COLUMNS, VALUE, VALUE_TILE)
    store_rows(grad_turn, sequence, head, first, columns, d_turn, BLOCK_COLUMNS, TURN, TURN_TILE)
