"""Gradients of the moments of the attention weights: a sweep over the keys of each query, two over a key's queries.

All three make the weights again from the scores and lse, and none adds to what another program writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.attention_moments import (
    ANY_LENGTH,
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
def finite(lse):
    """What to subtract from scores: a query that attends to nothing has lse −inf, as all of its scores."""
    return tl.where(lse == float("-inf"), 0.0, lse)


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
        ∂query_i = scale (Σ a_ij b_ij k_j − p_i Σ a_ij k_j), and ∂tangent_i as well if there is no tangent
        ∂aim_i = −w_i Σ a_ij k_j,  ∂output_i = −D_i Σ a_ij t_ij

    for ℓ, w, D = grad_lse, grad_mean, grad_covariance, each of which may be None. Arguments as those of the forward
    kernel, the gradients as what they belong to. pull = p and offset = D·o (None without D), numbers of each query in
    float32, are written for the sweep over the keys.
    """
    sequence, head, block = sequence_head_block(rows, heads, BLOCK_ROWS)
    STREAM: tl.constexpr = query[0].dtype.element_ty
    scale = tl.cast(scale, tl.float32)
    numbers = (sequence * heads + head) * rows
    first = (tl.cdiv(rows, BLOCK_ROWS) - 1 - block) * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    q = load_rows(query, sequence, head, first, rows, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
    above = finite(load(lse + numbers, row, row < rows))
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
            turned = tl.zeros((BLOCK_ROWS, HEAD_TILE), tl.float32)
    p = tl.zeros((BLOCK_ROWS,), tl.float32)
    moved_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    pushed = tl.zeros((BLOCK_ROWS, HEAD_TILE), tl.float32)
    average = tl.zeros((BLOCK_ROWS, HEAD_TILE), tl.float32)
    low, high = keys_of(first, rows, columns, window, CAUSAL, BLOCK_ROWS)
    for start in range(low, high, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        k = load_rows(key, sequence, head // groups, start, columns, STREAM, BLOCK_COLUMNS, HEAD, HEAD_TILE)
        raw = scale * products(q, k, STREAM, EMULATED)
        score = masked(
            raw,
            row[:, None],
            column[None, :],
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
        weight = tl.exp(score - above[:, None])
        b = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        if grad_mean is not None:
            turns = load_rows(turn, sequence, head, start, columns, STREAM, BLOCK_COLUMNS, TURN, TURN_TILE)
            against = product(aims, tl.trans(k), products(back, turns, STREAM, EMULATED), STREAM, EMULATED)
            b -= w[:, None] * against
        if grad_covariance is not None:
            v = load_rows(value, sequence, head // groups, start, columns, STREAM, BLOCK_COLUMNS, VALUE, VALUE_TILE)
            gap = products(d, v, STREAM, EMULATED) - d_dot_o[:, None]
            moved = raw
            if tangent is not None:
                moved = scale * products(t, k, STREAM, EMULATED)
                turned = product(weight * gap, k, turned, STREAM, EMULATED)
            b += moved * gap
            moved_sum += tl.sum(weight * moved, 1)
        p += tl.sum(weight * b, 1)
        if grad_covariance is not None and tangent is None:
            b += gap
        pushed = product(weight * b, k, pushed, STREAM, EMULATED)
        average = product(weight, k, average, STREAM, EMULATED)
    if grad_lse is not None:
        p -= load(grad_lse + numbers, row, row < rows)
    store(pull + numbers, row, row < rows, p)
    pushed = scale * (pushed - p[:, None] * average)
    store_rows(grad_query, sequence, head, first, rows, pushed, BLOCK_ROWS, HEAD, HEAD_TILE)
    store_rows(grad_aim, sequence, head, first, rows, -w[:, None] * average, BLOCK_ROWS, HEAD, HEAD_TILE)
    d_output = tl.zeros((BLOCK_ROWS, VALUE_TILE), tl.float32)
    d_tangent = tl.zeros((BLOCK_ROWS, HEAD_TILE), tl.float32)
    if grad_covariance is not None:
        # Read once more, rather than kept in registers during the sweep.
        d = load_rows(grad_covariance, sequence, head, first, rows, STREAM, BLOCK_ROWS, VALUE, VALUE_TILE)
        d_output = -moved_sum[:, None] * d.to(tl.float32)
        if tangent is not None:
            d_tangent = scale * turned
    store_rows(grad_output, sequence, head, first, rows, d_output, BLOCK_ROWS, VALUE, VALUE_TILE)
    if tangent is not None:
        store_rows(grad_tangent, sequence, head, first, rows, d_tangent, BLOCK_ROWS, HEAD, HEAD_TILE)


@triton.jit(do_not_specialize=ANY_LENGTH)
def attention_moments_backward_columns(
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
    grad_value,
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
    """Gradients of key and value; one program per block of keys, which goes through the heads that share them.

        ∂key_j = Σ_i scale a_ij (b_ij − p_i) q_i + scale a_ij g_ij (tangent_i or q_i) − a_ij w_i aim_i
        ∂value_j = Σ_i a_ij t_ij D_i

    with the symbols of the sweep over the queries, whose pull = p and offset = D·o are read here. Tiles are
    (keys, queries), as the products that follow want them.
    """
    sequence, shared, block = sequence_head_block(columns, heads // groups, BLOCK_COLUMNS)
    STREAM: tl.constexpr = query[0].dtype.element_ty
    scale = tl.cast(scale, tl.float32)
    first = block * BLOCK_COLUMNS
    column = first + tl.arange(0, BLOCK_COLUMNS)
    k = load_rows(key, sequence, shared, first, columns, STREAM, BLOCK_COLUMNS, HEAD, HEAD_TILE)
    if grad_covariance is not None:
        v = load_rows(value, sequence, shared, first, columns, STREAM, BLOCK_COLUMNS, VALUE, VALUE_TILE)
    # −∂key: the sign of aim's part costs nothing in the factor of the others.
    away = tl.zeros((BLOCK_COLUMNS, HEAD_TILE), tl.float32)
    d_value = tl.zeros((BLOCK_COLUMNS, VALUE_TILE), tl.float32)
    low, high = queries_of(first, rows, columns, window, CAUSAL, BLOCK_COLUMNS)
    for head in range(shared * groups, (shared + 1) * groups):
        numbers = (sequence * heads + head) * rows
        if grad_mean is not None:
            turns = load_rows(turn, sequence, head, first, columns, STREAM, BLOCK_COLUMNS, TURN, TURN_TILE)
        for start in range(low, high, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            q = load_rows(query, sequence, head, start, rows, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
            raw = scale * products(k, q, STREAM, EMULATED)
            score = masked(
                raw,
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
            weight = tl.exp(score - finite(load(lse + numbers, row, row < rows))[None, :])
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
                moved = raw
                if tangent is not None:
                    t = load_rows(tangent, sequence, head, start, rows, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
                    moved = scale * products(k, t, STREAM, EMULATED)
                    away = product(weight * (-scale * gap), t, away, STREAM, EMULATED)
                b += moved * gap
                if tangent is None:
                    b += gap
                d_value = product(weight * moved, d, d_value, STREAM, EMULATED)
            away = product(weight * (-scale * b), q, away, STREAM, EMULATED)
    store_rows(grad_key, sequence, shared, first, columns, -away, BLOCK_COLUMNS, HEAD, HEAD_TILE)
    store_rows(grad_value, sequence, shared, first, columns, d_value, BLOCK_COLUMNS, VALUE, VALUE_TILE)


@triton.jit(do_not_specialize=ANY_LENGTH)
def attention_moments_backward_turns(
    query,
    key,
    reverse,
    mask,
    mask_sequence,
    mask_head,
    mask_query,
    mask_key,
    lse,
    grad_mean,
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
    TURN: tl.constexpr,
    TURN_TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Gradient of turn, ∂turn_j = Σ_i a_ij w_i angle_i; one program per block of keys and query head.

    A sweep of its own, because a third sum as wide as a head would have the one above spill registers. It costs the
    scores once more, one of the fifteen products of the backward pass.
    """
    sequence, head, block = sequence_head_block(columns, heads, BLOCK_COLUMNS)
    STREAM: tl.constexpr = query[0].dtype.element_ty
    scale = tl.cast(scale, tl.float32)
    numbers = (sequence * heads + head) * rows
    first = block * BLOCK_COLUMNS
    column = first + tl.arange(0, BLOCK_COLUMNS)
    k = load_rows(key, sequence, head // groups, first, columns, STREAM, BLOCK_COLUMNS, HEAD, HEAD_TILE)
    d_turn = tl.zeros((BLOCK_COLUMNS, TURN_TILE), tl.float32)
    low, high = queries_of(first, rows, columns, window, CAUSAL, BLOCK_COLUMNS)
    for start in range(low, high, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        q = load_rows(query, sequence, head, start, rows, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
        back = load_rows(reverse, sequence, head, start, rows, STREAM, BLOCK_ROWS, TURN, TURN_TILE)
        score = masked(
            scale * products(k, q, STREAM, EMULATED),
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
        weight = tl.exp(score - finite(load(lse + numbers, row, row < rows))[None, :])
        w = load(grad_mean + numbers, row, row < rows)[None, :]
        d_turn = product(weight * -w, back, d_turn, STREAM, EMULATED)
    store_rows(grad_turn, sequence, head, first, columns, d_turn, BLOCK_COLUMNS, TURN, TURN_TILE)
