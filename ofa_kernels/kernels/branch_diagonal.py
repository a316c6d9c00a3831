"""Diagonals and traces of summed Jacobians, from token sums and one read of the weights.

A weight is the group (pointer, stride of a head, of a row, of a channel). In products with bfloat16 weights, the
float32 operand is split into two bfloat16 numbers, with an error of 2⁻¹⁷; other products are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.tile import load, store


@triton.jit
def weight_tile(weight, head, row, channel, inside):
    """A tile of a head's weights in float32; `row` and `channel` broadcast to the tile."""
    start = weight[0] + head * weight[1]
    return load(start, row.to(tl.int64) * weight[2] + channel.to(tl.int64) * weight[3], inside)


@triton.jit
def split_product(left, right, total, SPLIT: tl.constexpr, EMULATED: tl.constexpr, WEIGHT_LEFT: tl.constexpr):
    """`total` + `left` `right` in float32; if SPLIT, one of the two holds bfloat16 weights."""
    if SPLIT:
        if WEIGHT_LEFT:
            high, low = _halves(right)
            total = _dot(left.to(tl.bfloat16), high, _dot(left.to(tl.bfloat16), low, total, EMULATED), EMULATED)
        else:
            high, low = _halves(left)
            total = _dot(high, right.to(tl.bfloat16), _dot(low, right.to(tl.bfloat16), total, EMULATED), EMULATED)
    else:
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _halves(x):
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _dot(left, right, total, EMULATED: tl.constexpr):
    if EMULATED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit(do_not_specialize=["sequences", "runs"])
def mlp_diagonal_tiles(
    gate,
    up,
    down,
    gate_sum,
    up_sum,
    scale,
    diagonal,
    along,
    inner,
    width,
    sequences,
    runs,
    SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """D_k = Σ_f W_d[k, f] (p_g,f W_g[f, k] + p_u,f W_u[f, k]) of every sequence, over a run of inner channels.

    One program per tile of channels k and run. Inputs: the weights in groups, up or None; gate_sum = p_g and up_sum =
    p_u, groups (pointer, stride of a sequence); scale = γ, (width,), or None. Outputs in float32: diagonal, (runs,
    sequences, width); along, the tile's part of W_g γ and W_u γ, (tiles, 1 or 2, inner), or None. SLOTS, 1 or 16, is
    the capacity for sequences.
    """
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(width, BLOCK_COLUMNS)
    tile, run = program % tiles, program // tiles
    channel = (tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int32)
    in_width = channel < width
    slot = tl.arange(0, SLOTS)
    total = tl.zeros((SLOTS, BLOCK_COLUMNS), tl.float32)
    if SLOTS == 1:
        # Reduced over the inner channels once, after the loop.
        part = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    if scale is not None:
        gamma = load(scale, channel, in_width)[None, :]
    PARTS: tl.constexpr = 1 if up is None else 2
    blocks = tl.cdiv(tl.cdiv(inner, BLOCK_ROWS), runs)
    low = (run * blocks * BLOCK_ROWS).to(tl.int32)
    for start in range(low, tl.minimum(low + blocks * BLOCK_ROWS, inner), BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        in_inner = row < inner
        inside = in_inner[:, None] & in_width[None, :]
        back = tl.trans(weight_tile(down, 0, channel[:, None], row[None, :], in_width[:, None] & in_inner[None, :]))
        for index in tl.static_range(PARTS):
            if index == 0:
                own = weight_tile(gate, 0, row[:, None], channel[None, :], inside)
                sums = gate_sum
            else:
                own = weight_tile(up, 0, row[:, None], channel[None, :], inside)
                sums = up_sum
            if SLOTS == 1:
                part += own * back * load(sums[0], row, in_inner)[:, None]
            else:
                of_sequences = load(
                    sums[0], slot[:, None] * sums[1] + row[None, :], (slot < sequences)[:, None] & in_inner[None, :]
                )
                total = tl.dot(of_sequences, own * back, total, input_precision="ieee")
            if along is not None:
                target = along + (tile * PARTS + index) * inner
                store(target, row, in_inner, tl.sum(own * gamma, 1))
    if SLOTS == 1:
        total = tl.sum(part, 0)[None, :]
    at = slot[:, None] * width + channel[None, :]
    store(diagonal + run * sequences * width, at, (slot < sequences)[:, None] & in_width[None, :], total)


@triton.jit(do_not_specialize=["sequences"])
def attention_trace_tiles(
    query,
    key,
    value,
    output,
    query_sum,
    key_sum,
    value_sum,
    factor,
    scale,
    traces,
    heads,
    groups,
    width,
    sequences,
    EMULATED: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """tr(C M_q), tr(K M_k) and ā tr(M_v) of every sequence, M = W G W_o; each program some rows of one of the three M.

    Inputs: weights in groups, (heads or heads/groups, HEAD or VALUE, width), output (heads, width, VALUE); query_sum,
    key_sum = C, K, (sequences, heads, VALUE, HEAD), and value_sum = ā, (sequences, heads), dense; factor = e and scale
    = γ (or None), (width,): G = diag(e) − γγᵀ/width. Output: traces, (programs, sequences) float32.
    """
    rows: tl.constexpr = HEAD if HEAD > VALUE else VALUE
    blocks: tl.constexpr = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    program = tl.program_id(0).to(tl.int64)
    block, kind, head = program % blocks, program // blocks % 3, program // blocks // 3
    first = (block * BLOCK_ROWS).to(tl.int32)
    if kind == 0:
        _trace_of_rows(
            query, output, query_sum, factor, scale, traces, head, head, heads, first, width,
            sequences, EMULATED, HEAD, VALUE, VALUE_TILE, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
    elif kind == 1:
        _trace_of_rows(
            key, output, key_sum, factor, scale, traces, head, head // groups, heads, first, width,
            sequences, EMULATED, HEAD, VALUE, VALUE_TILE, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
    else:
        _trace_of_rows(
            value, output, value_sum, factor, scale, traces, head, head // groups, heads, first, width,
            sequences, EMULATED, 0, VALUE, VALUE_TILE, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip


@triton.jit
def _trace_of_rows(
    weight, output, sums, factor, scale, traces, head, own_head, heads, first, width,
    sequences, EMULATED: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr,
    VALUE_TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows first… of M = W G W_o times the matching columns of the sums, which are ā times the identity if HEAD = 0."""
    SPLIT: tl.constexpr = weight[0].dtype.element_ty == tl.bfloat16
    ROWS: tl.constexpr = VALUE if HEAD == 0 else HEAD
    row, depth = first + tl.arange(0, BLOCK_ROWS), tl.arange(0, VALUE_TILE)
    in_rows, in_value = row < ROWS, depth < VALUE
    total = tl.zeros((BLOCK_ROWS, VALUE_TILE), tl.float32)
    if scale is not None:
        before = tl.zeros((BLOCK_ROWS,), tl.float32)
        after = tl.zeros((VALUE_TILE,), tl.float32)
    for start in range(0, width, BLOCK_COLUMNS):
        channel = start + tl.arange(0, BLOCK_COLUMNS)
        in_width = channel < width
        w = weight_tile(weight, own_head, row[:, None], channel[None, :], in_rows[:, None] & in_width[None, :])
        o = weight_tile(output, head, channel[:, None], depth[None, :], in_width[:, None] & in_value[None, :])
        total = split_product(w, o * load(factor, channel, in_width)[:, None], total, SPLIT, EMULATED, True)
        if scale is not None:
            gamma = load(scale, channel, in_width)
            before += tl.sum(w * gamma[None, :], 1)
            after += tl.sum(o * gamma[:, None], 0)
    if scale is not None:
        total -= before[:, None] * after[None, :] / width
    program = tl.program_id(0).to(tl.int64)
    for sequence in range(sequences):
        if HEAD == 0:
            found = tl.where(row[:, None] == depth[None, :], total, 0.0) * tl.load(sums + sequence * heads + head)
        else:
            matrix = sums + (sequence * heads + head) * (VALUE * HEAD)
            found = total * load(matrix, depth[None, :] * HEAD + row[:, None], in_value[None, :] & in_rows[:, None])
        tl.store(traces + program * sequences + sequence, tl.sum(found))


@triton.jit(do_not_specialize=["runs"])
def attention_diagonal_tiles(
    query,
    key,
    value,
    output,
    query_sum,
    key_sum,
    value_sum,
    scale,
    diagonal,
    along,
    heads,
    groups,
    width,
    runs,
    EMULATED: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Row sums of W_o ⊙ (C W_q + K W_k + ā W_v)ᵀ over a run of heads; one program per tile of channels and run.

    Inputs as for `attention_trace_tiles`, the sums of one sequence; outputs in float32: diagonal, (runs, width); along,
    the tile's part of (C W_q + K W_k + ā W_v) γ, (tiles, heads, VALUE), or None.
    """
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(width, BLOCK_COLUMNS)
    tile, run = program % tiles, program // tiles
    channel = (tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int32)
    depth = tl.arange(0, VALUE_TILE)
    in_width, in_value = channel < width, depth < VALUE
    inside = in_value[:, None] & in_width[None, :]
    total = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    share = tl.cdiv(heads, runs)
    low = (run * share).to(tl.int32)
    for head in range(low, tl.minimum(low + share, heads)):
        own = head // groups
        found = weight_tile(value, own, depth[:, None], channel[None, :], inside) * tl.load(value_sum + head)
        found = _add_product(
            query_sum, query, head, head, channel, found, in_width, EMULATED, HEAD, VALUE, VALUE_TILE, BLOCK_ROWS
        )
        found = _add_product(
            key_sum, key, head, own, channel, found, in_width, EMULATED, HEAD, VALUE, VALUE_TILE, BLOCK_ROWS
        )
        total += tl.sum(found * weight_tile(output, head, channel[None, :], depth[:, None], inside), 0)
        if along is not None:
            gamma = load(scale, channel, in_width)[None, :]
            store(along + (tile * heads + head) * VALUE, depth, in_value, tl.sum(found * gamma, 1))
    store(diagonal + run * width, channel, in_width, total)


@triton.jit
def _add_product(
    sums, weight, head, own, channel, total, in_width, EMULATED: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, VALUE_TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """`total` + C W for some channels of one head."""
    SPLIT: tl.constexpr = weight[0].dtype.element_ty == tl.bfloat16
    depth = tl.arange(0, VALUE_TILE)
    matrix = sums + tl.cast(head, tl.int64) * (VALUE * HEAD)
    for start in range(0, HEAD, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        in_head = row < HEAD
        c = load(matrix, depth[:, None] * HEAD + row[None, :], (depth < VALUE)[:, None] & in_head[None, :])
        w = weight_tile(weight, own, row[:, None], channel[None, :], in_head[:, None] & in_width[None, :])
        total = split_product(c, w, total, SPLIT, EMULATED, False)
    return total


@triton.jit(do_not_specialize=["sequences"])
def image_rows(
    weight,
    vectors,
    images,
    heads,
    inner,
    width,
    sequences,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """images[b, k] = Σ_h Σ_e W[h, k, e] vectors[b, h, e], one program per tile of channels k and sequence.

    weight in a group; vectors, (sequences, heads, inner), and images, (sequences, width), dense float32.
    """
    program = tl.program_id(0).to(tl.int64)
    tile, sequence = program // sequences, program % sequences
    channel = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int32)
    in_width = channel < width
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for head in range(heads):
        for start in range(0, inner, BLOCK_COLUMNS):
            column = start + tl.arange(0, BLOCK_COLUMNS)
            in_inner = column < inner
            w = weight_tile(weight, head, channel[:, None], column[None, :], in_width[:, None] & in_inner[None, :])
            total += w * load(vectors + (sequence * heads + head) * inner, column, in_inner)[None, :]
    store(images + sequence * width, channel, in_width, tl.sum(total, 1))
