"""Token sums of the own-token Jacobian of an attention, in two sweeps over its scores without storing them.

The first sweep goes by queries: log-sum-exp, own weight and mean key of each. The second goes by keys: Σ_i w_i a_ij
R_iᵀk_j from the sums of w_i a_ij cos θ_i and w_i a_ij sin θ_i. A third kernel computes the products of tokens by
channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.attention_scores import (
    LOG2_E,
    head_of,
    keys_of,
    load_rows,
    masked,
    product,
    products,
    queries_of,
    sequence_head_block,
    slope_of_cap,
    store_rows,
)
from ofa_kernels.kernels.tile import load, store

LSE, OWN, SLOPE, SCORE, QUERY_RSTD, KEY_RSTD = (tl.constexpr(plane) for plane in range(6))
"""Planes of `numbers`: log₂ Σ 2^score, a_ii, a_ii κ_ii, s q_i·k_i, and 1/σ of the norms on queries and keys."""

ANY_LENGTH = ("mask", "weights", "numbers", "plane", "tokens", "heads", "groups", "read_groups", "runs", "window")
"""Arguments that depend on a sequence's length; Triton would compile again for lengths divisible by 16."""


@triton.jit(do_not_specialize=ANY_LENGTH)
def attention_curvature_queries(
    query,
    key,
    value,
    output,
    query_entering,
    key_entering,
    sinks,
    mask,
    move_query,
    move_key,
    move_value,
    read_value,
    read_output,
    numbers,
    plane,
    mean_key,
    pull,
    moved,
    tokens,
    heads,
    groups,
    read_groups,
    window,
    scale,
    softcap,
    query_eps,
    key_eps,
    CAUSAL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    PER_QUERY: tl.constexpr,
    EMULATED: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    READ: tl.constexpr,
    READ_TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sums over the keys of each query; one program per block of queries of a head.

        l_i = log₂ Σ_j 2^score_ij (the sink's among them),   mean_key_i = Σ_j a_ij κ_ij k_j
        pull_i = r_i = Σ_j a_ij κ_ij s (q_i·k_j)(v_j − o_i)
        moved_i = Σ_j a_ij κ_ij s (δq_i·k_j)(v_j − o_i) + a_ii ( κ_ii s (q_i·δk_i)(v_i − o_i) + δv_i ),
            with v, o and δv from read_value, read_output and move_value

    Inputs in groups (see `attention_scores`): query, key, value, output; query_entering and key_entering, which the
    norms of heads read, or None; sinks, (heads,), or None; move_query and move_key, or None for q and k themselves;
    move_value, read_value (each head serves `read_groups` query heads) and read_output, or None together. Outputs:
    numbers, planes of (B, heads, tokens) in float32, `plane` apart; mean_key, pull (or None) and moved (or None) in
    groups. Products take their operands in the dtype of query; all else is float32.
    """
    STREAM: tl.constexpr = query[0].dtype.element_ty
    sequence, head, block = sequence_head_block(tokens, heads, BLOCK_ROWS)
    scale = tl.cast(scale, tl.float32)
    shared = head // groups
    # Start with the last queries: in causal attention they have the most keys.
    first = (tl.cdiv(tokens, BLOCK_ROWS) - 1 - block) * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    q = load_rows(query, sequence, head, first, tokens, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
    if move_query is not None:
        direction = load_rows(move_query, sequence, head, first, tokens, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
    highest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    keys_sum = tl.zeros((BLOCK_ROWS, HEAD_TILE), tl.float32)
    if pull is not None:
        pull_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
        pull_values = tl.zeros((BLOCK_ROWS, VALUE_TILE), tl.float32)
    if moved is not None:
        move_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
        move_values = tl.zeros((BLOCK_ROWS, READ_TILE), tl.float32)
    low, high = keys_of(first, tokens, window, CAUSAL, BLOCK_ROWS)
    for start in range(low, high, BLOCK_COLUMNS):
        k = load_rows(key, sequence, shared, start, tokens, STREAM, BLOCK_COLUMNS, HEAD, HEAD_TILE)
        raw = products(q, k, STREAM, EMULATED) * scale
        column = start + tl.arange(0, BLOCK_COLUMNS)
        score, kappa = raw, 1.0
        if softcap is not None:
            score, kappa = slope_of_cap(raw, softcap)
        score = masked(
            score * LOG2_E, row[:, None], column[None, :], tokens, sequence, head, mask, window,
            CAUSAL, ADDITIVE, PER_QUERY,
        )  # fmt: skip
        before, highest = highest, tl.maximum(highest, tl.max(score, 1))
        # All keys masked so far: −inf − (−inf) would be NaN.
        above = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp2(score - above[:, None])
        keep = tl.exp2(before - above)
        total = total * keep + tl.sum(weight, 1)
        weight *= kappa
        keys_sum = product(weight, k, keys_sum * keep[:, None], STREAM, EMULATED)
        if pull is not None:
            # Sum the rounded weights that are multiplied: the rounding error then scales v − o, not v and o separately.
            along = (weight * raw).to(STREAM)
            v = load_rows(value, sequence, shared, start, tokens, STREAM, BLOCK_COLUMNS, VALUE, VALUE_TILE)
            pull_sum = pull_sum * keep + tl.sum(along.to(tl.float32), 1)
            pull_values = product(along, v, pull_values * keep[:, None], STREAM, EMULATED)
        if moved is not None:
            if move_query is not None:
                along = (weight * (products(direction, k, STREAM, EMULATED) * scale)).to(STREAM)
            else:
                along = (weight * raw).to(STREAM)
            v = load_rows(
                read_value, sequence, head // read_groups, start, tokens, STREAM, BLOCK_COLUMNS, READ, READ_TILE
            )
            move_sum = move_sum * keep + tl.sum(along.to(tl.float32), 1)
            move_values = product(along, v, move_values * keep[:, None], STREAM, EMULATED)
    attends = total > 0
    shrink = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        above = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - above)
        total = total * shrink + tl.exp2(sink - above)
        highest = above
    lse = tl.where(attends, highest + tl.log2(tl.where(attends, total, 1.0)), float("inf"))
    share = tl.where(attends, shrink / tl.where(attends, total, 1.0), 0.0)
    store_rows(mean_key, sequence, head, first, tokens, keys_sum * share[:, None], BLOCK_ROWS, HEAD, HEAD_TILE)

    q = q.to(tl.float32)
    k = load_rows(key, sequence, shared, first, tokens, tl.float32, BLOCK_ROWS, HEAD, HEAD_TILE)
    raw = tl.sum(q * k, 1) * scale
    score, kappa = raw, 1.0
    if softcap is not None:
        score, kappa = slope_of_cap(raw, softcap)
    score = masked(
        score * LOG2_E, row, row, tokens, sequence, head, mask, window, CAUSAL, ADDITIVE, PER_QUERY
    )  # fmt: skip
    own = tl.exp2(score - lse)
    number = numbers + (sequence * heads + head) * tokens
    inside = row < tokens
    store(number + LSE * plane, row, inside, lse)
    store(number + OWN * plane, row, inside, own)
    store(number + SLOPE * plane, row, inside, own * kappa)
    store(number + SCORE * plane, row, inside, raw)
    if query_entering is not None:
        entering = load_rows(query_entering, sequence, head, first, tokens, tl.float32, BLOCK_ROWS, HEAD, HEAD_TILE)
        rstd = tl.rsqrt(tl.sum(entering * entering, 1) / HEAD + tl.cast(query_eps, tl.float32))
        store(number + QUERY_RSTD * plane, row, inside, rstd)
    if key_entering is not None:
        entering = load_rows(key_entering, sequence, shared, first, tokens, tl.float32, BLOCK_ROWS, HEAD, HEAD_TILE)
        rstd = tl.rsqrt(tl.sum(entering * entering, 1) / HEAD + tl.cast(key_eps, tl.float32))
        store(number + KEY_RSTD * plane, row, inside, rstd)
    if pull is not None:
        o = load_rows(output, sequence, head, first, tokens, tl.float32, BLOCK_ROWS, VALUE, VALUE_TILE)
        pull_values = (pull_values - pull_sum[:, None] * o) * share[:, None]
        store_rows(pull, sequence, head, first, tokens, pull_values, BLOCK_ROWS, VALUE, VALUE_TILE)
    if moved is not None:
        o = load_rows(read_output, sequence, head, first, tokens, tl.float32, BLOCK_ROWS, READ, READ_TILE)
        v = load_rows(read_value, sequence, head // read_groups, first, tokens, tl.float32, BLOCK_ROWS, READ, READ_TILE)
        change = load_rows(
            move_value, sequence, head // read_groups, first, tokens, tl.float32, BLOCK_ROWS, READ, READ_TILE
        )
        if move_key is not None:
            k = load_rows(move_key, sequence, shared, first, tokens, tl.float32, BLOCK_ROWS, HEAD, HEAD_TILE)
            raw = tl.sum(q * k, 1) * scale
        move_values = (move_values - move_sum[:, None] * o) * share[:, None]
        move_values += (own * kappa * raw)[:, None] * (v - o) + own[:, None] * change
        store_rows(moved, sequence, head, first, tokens, move_values, BLOCK_ROWS, READ, READ_TILE)


@triton.jit(do_not_specialize=ANY_LENGTH)
def attention_curvature_keys(
    query,
    key,
    cosine,
    sine,
    weights,
    mask,
    numbers,
    plane,
    turned,
    tokens,
    heads,
    groups,
    window,
    scale,
    softcap,
    NORMED: tl.constexpr,
    CAUSAL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    PER_QUERY: tl.constexpr,
    EMULATED: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    TURN: tl.constexpr,
    TURN_TILE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """turned_j = Σ_i w_i a_ij κ_ij R_iᵀk_j; one program per block of keys of a query head.

        channel pairs (x, y) → (α^c x + α^s y, α^c y − α^s x),   α^c_j = Σ_i w_i a_ij κ_ij cos θ_i,   α^s_j likewise

    Inputs in groups: query, key; cosine and sine, TURN channels, whose heads are one, or None; weights = w, the group
    (pointer, stride of a sequence), times the norm's 1/σ_q,i if NORMED; numbers, from the first sweep. Output: turned.
    """
    STREAM: tl.constexpr = query[0].dtype.element_ty
    sequence, head, block = sequence_head_block(tokens, heads, BLOCK_COLUMNS)
    scale = tl.cast(scale, tl.float32)
    shared = head // groups
    first = block * BLOCK_COLUMNS
    column = first + tl.arange(0, BLOCK_COLUMNS)
    number = numbers + (sequence * heads + head) * tokens
    peak = 1.0
    if STREAM == tl.float16:  # noqa: SIM300
        # Weights of 1/(Nσ²) would underflow in float16; relative to the largest they do not.
        peak = _peak(weights, number, plane, sequence, tokens, NORMED)
    k = load_rows(key, sequence, shared, first, tokens, STREAM, BLOCK_COLUMNS, HEAD, HEAD_TILE)
    plain = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    if TURN > 0:
        along = tl.zeros((BLOCK_COLUMNS, TURN_TILE), tl.float32)
        across = tl.zeros((BLOCK_COLUMNS, TURN_TILE), tl.float32)
    low, high = queries_of(first, tokens, window, CAUSAL, BLOCK_COLUMNS)
    for start in range(low, high, BLOCK_ROWS):
        q = load_rows(query, sequence, head, start, tokens, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = row < tokens
        score, kappa = products(k, q, STREAM, EMULATED) * scale, 1.0
        if softcap is not None:
            score, kappa = slope_of_cap(score, softcap)
        score = masked(
            score * LOG2_E, row[None, :], column[:, None], tokens, sequence, head, mask, window,
            CAUSAL, ADDITIVE, PER_QUERY,
        )  # fmt: skip
        share = _share(weights, number, plane, sequence, row, inside, NORMED) / peak
        weight = tl.exp2(score - load(number + LSE * plane, row, inside)[None, :]) * kappa * share[None, :]
        plain += tl.sum(weight, 1)
        if TURN > 0:
            c = load_rows(cosine, sequence, 0, start, tokens, STREAM, BLOCK_ROWS, TURN, TURN_TILE)
            s = load_rows(sine, sequence, 0, start, tokens, STREAM, BLOCK_ROWS, TURN, TURN_TILE)
            along = product(weight, c, along, STREAM, EMULATED)
            across = product(weight, s, across, STREAM, EMULATED)
    source = head_of(key, sequence, shared) + column.to(tl.int64)[:, None] * key[3]
    target = head_of(turned, sequence, head) + column.to(tl.int64)[:, None] * turned[3]
    inside = (column < tokens)[:, None]
    if TURN > 0:
        pair = tl.arange(0, TURN_TILE)[None, :]
        first_of = pair * 2 if INTERLEAVED else pair
        second_of = first_of + (1 if INTERLEAVED else TURN)
        paired = inside & (pair < TURN)
        x, y = load(source, first_of, paired), load(source, second_of, paired)
        store(target, first_of, paired, (along * x + across * y) * peak)
        store(target, second_of, paired, (along * y - across * x) * peak)
    if 2 * TURN < HEAD:
        channel = tl.arange(0, HEAD_TILE)[None, :]
        unturned = inside & (channel >= 2 * TURN) & (channel < HEAD)
        store(target, channel, unturned, load(source, channel, unturned) * (plain * peak)[:, None])


@triton.jit(do_not_specialize=ANY_LENGTH)
def attention_curvature_sums(
    query,
    value,
    output,
    mean_key,
    turned,
    pull,
    cosine,
    sine,
    query_entering,
    query_scale,
    key_entering,
    key_scale,
    weights,
    numbers,
    plane,
    sums,
    tokens,
    heads,
    groups,
    runs,
    scale,
    EMULATED: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    TURN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """C, K and ā of a head, each program a tile of C or of K over a run of tokens.

        C = Σ_i v_i (s Γ_q turned_i)ᵀ − (u_i o_i)(s Γ_q R_iᵀmean_key_i)ᵀ − (u_i pull_i) q̂_iᵀ/d,   u_i = w_i/σ_q,i
        K = Σ_i (w_i/σ_k,i)( a_ii κ_ii (v_i − o_i)(s Γ_k R_iᵀq_i)ᵀ − a_ii κ_ii s (q_i·k_i)(v_i − o_i) k̂_iᵀ/d )

    Inputs: those of the sweeps and their outputs; query_scale and key_scale = Γ_q and Γ_k, or None without norms.
    Output: sums, (runs, B · heads · (2 · VALUE · HEAD + 1)) float32: every C, every K, every ā.
    """
    STREAM: tl.constexpr = tl.bfloat16 if query[0].dtype.element_ty == tl.bfloat16 else tl.float32
    across: tl.constexpr = (HEAD + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    down: tl.constexpr = (VALUE + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0).to(tl.int64)
    run, tile = program % runs, program // runs
    of_heads, tile = tile % across, tile // across
    of_values, tile = tile % down, tile // down
    for_keys, tile = tile % 2, tile // 2
    sequence, head = tile // heads, tile % heads
    shared = head // groups
    scale = tl.cast(scale, tl.float32)
    channel = (of_heads * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    depth = (of_values * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    in_head, in_value = channel < HEAD, depth < VALUE
    number = numbers + tile * tokens
    total = tl.zeros((BLOCK_COLUMNS, BLOCK_COLUMNS), tl.float32)
    weight_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    blocks = tl.cdiv(tl.cdiv(tokens, BLOCK_ROWS), runs)
    low = (run * blocks * BLOCK_ROWS).to(tl.int32)
    for start in range(low, tl.minimum(low + blocks * BLOCK_ROWS, tokens), BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = row < tokens
        at, within = row.to(tl.int64)[:, None], inside[:, None]
        v = load(head_of(value, sequence, shared), at * value[3] + depth, within & in_value)
        o = load(head_of(output, sequence, head), at * output[3] + depth, within & in_value)
        if for_keys == 0:
            share = _share(weights, number, plane, sequence, row, inside, query_scale is not None)[:, None]
            right = load(head_of(turned, sequence, head), at * turned[3] + channel, within & in_head) * scale
            mean = _turned_back(
                mean_key, cosine, sine, sequence, head, at, within, channel, HEAD, TURN, INTERLEAVED
            ) * scale  # fmt: skip
            if query_scale is not None:
                gamma = load(query_scale, channel, in_head)
                right *= gamma
                mean *= gamma
            total = product(tl.trans(v), right, total, STREAM, EMULATED)
            total = product(tl.trans(-share * o), mean, total, STREAM, EMULATED)
            if pull is not None:
                entering = load(
                    head_of(query_entering, sequence, head), at * query_entering[3] + channel, within & in_head
                )
                rstd = load(number + QUERY_RSTD * plane, row, inside)[:, None]
                r = load(head_of(pull, sequence, head), at * pull[3] + depth, within & in_value)
                total = product(tl.trans(-share * r), entering * rstd / HEAD, total, STREAM, EMULATED)
        else:
            w = _share(weights, number, plane, sequence, row, inside, False)
            weight_sum += w * load(number + OWN * plane, row, inside)
            left = w * load(number + SLOPE * plane, row, inside)
            right = _turned_back(
                query, cosine, sine, sequence, head, at, within, channel, HEAD, TURN, INTERLEAVED
            ) * scale  # fmt: skip
            if key_scale is not None:
                right *= load(key_scale, channel, in_head)
                key_rstd = load(number + KEY_RSTD * plane, row, inside)
                left *= key_rstd
                entering = load(
                    head_of(key_entering, sequence, shared), at * key_entering[3] + channel, within & in_head
                )
                along = load(number + SCORE * plane, row, inside) * key_rstd / HEAD
                right -= along[:, None] * entering
            total = product(tl.trans(left[:, None] * (v - o)), right, total, STREAM, EMULATED)
    matrix = VALUE * HEAD
    count = tl.num_programs(0).to(tl.int64) // (runs * across * down * 2)
    start = sums + run * count * (2 * matrix + 1)
    at = tl.trans(depth) * HEAD + channel
    store(start + (for_keys * count + tile) * matrix, at, tl.trans(in_value) & in_head, total)
    if (for_keys == 1) & (of_heads == 0) & (of_values == 0):
        tl.store(start + 2 * count * matrix + tile, tl.sum(weight_sum))


@triton.jit
def _share(weights, number, plane, sequence, row, inside, NORMED: tl.constexpr):
    """w_i, or w_i/σ_q,i."""
    share = load(weights[0] + sequence * weights[1], row, inside)
    if NORMED:
        share *= load(number + QUERY_RSTD * plane, row, inside)
    return share


@triton.jit
def _peak(weights, number, plane, sequence, tokens, NORMED: tl.constexpr):
    """The largest weight of a sequence; 1 if all are 0."""
    largest = tl.zeros((256,), tl.float32)
    for start in range(0, tokens, 256):
        row = start + tl.arange(0, 256)
        largest = tl.maximum(largest, tl.abs(_share(weights, number, plane, sequence, row, row < tokens, NORMED)))
    peak = tl.max(largest)
    return tl.where(peak > 0.0, peak, 1.0)


@triton.jit
def _turned_back(
    tensor, cosine, sine, sequence, head, at, within, channel, HEAD: tl.constexpr, TURN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """R_iᵀ of rows: channel pairs (x, y) → (x cos + y sin, y cos − x sin); both of a pair by a second load."""
    start = head_of(tensor, sequence, head) + at * tensor[3]
    x = load(start, channel, within & (channel < HEAD))
    if TURN > 0:
        turns = within & (channel < 2 * TURN)
        if INTERLEAVED:
            pair, second = channel // 2, channel % 2 == 1
            partner = tl.where(second, channel - 1, channel + 1)
        else:
            second = channel >= TURN
            pair = tl.where(second, channel - TURN, channel)
            partner = tl.where(second, channel - TURN, channel + TURN)
        y = load(start, partner, turns)
        c = load(head_of(cosine, sequence, 0) + at * cosine[3], pair, turns)
        s = load(head_of(sine, sequence, 0) + at * sine[3], pair, turns)
        x = tl.where(turns, x * c + tl.where(second, -y, y) * s, x)
    return x
