"""Moments of the attention weights in one sweep over the keys; no matrix of all scores is ever made.

What the forward and the backward kernels share stands here as well. Their arguments come in groups: a tensor with
heads is the tuple (pointer, strides of a sequence, of a head, of a row), its last dimension dense; one number for each
query of each head is dense altogether; a mask has a stride for each dimension, 0 where it is the same along one. Tiles
are as wide as the next power of two; the channels behind a head's are 0 and add nothing to a product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.tile import load, store

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
"""Weights are powers of two: one instruction, where e to a power takes a product more."""
LOWEST = tl.constexpr(-3.0e38)

ANY_LENGTH = (
    "mask",
    "mask_sequence",
    "mask_head",
    "mask_query",
    "mask_key",
    "lse",
    "mean",
    "grad_lse",
    "grad_mean",
    "pull",
    "offset",
    "rows",
    "columns",
    "heads",
    "groups",
    "window",
)
"""Arguments in which a sequence's length shows: the same binary serves all, where 16 divides it and elsewhere."""


@triton.jit
def sequence_head_block(count, heads, BLOCK: tl.constexpr):
    """Which sequence, head and block of a head's `count` rows this program works on; a head's blocks are neighbours."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(count, BLOCK)
    return program // blocks // heads, program // blocks % heads, (program % blocks).to(tl.int32)


@triton.jit
def head_of(tensor, sequence, head):
    """Pointer to the first row of a head."""
    return tensor[0] + sequence * tensor[1] + head * tensor[2]


@triton.jit
def load_rows(
    tensor,
    sequence,
    head,
    first,
    count,
    STREAM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Rows first…first + ROWS − 1 of a head as operands of products, 0 outside of its `count` rows and WIDTH channels.

    Widening and rounding cancel where the tensor has the stream's dtype, and the compiler then copies it as it is.
    """
    row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    inside = (first + row < count) & (channel < WIDTH)
    start = head_of(tensor, sequence, head) + tl.cast(first, tl.int64) * tensor[3]
    return load(start, row * tensor[3] + channel, inside).to(STREAM)


@triton.jit
def store_rows(
    tensor,
    sequence,
    head,
    first,
    count,
    values,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Write what `load_rows` would read."""
    row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    inside = (first + row < count) & (channel < WIDTH)
    start = head_of(tensor, sequence, head) + tl.cast(first, tl.int64) * tensor[3]
    store(start, row * tensor[3] + channel, inside, values)


@triton.jit
def product(left, right, total, STREAM: tl.constexpr, EMULATED: tl.constexpr):
    """The sum `total` + `left` `right`, of operands in the stream's dtype, summed in float32.

    EMULATED: the interpreter multiplies the bits of bfloat16 as if they were integers, so that there the operands are
    widened again once they are rounded.
    """
    left, right = left.to(STREAM), right.to(STREAM)
    if EMULATED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def products(left, right, STREAM: tl.constexpr, EMULATED: tl.constexpr):
    """Every row of `left` with every row of `right`."""
    return product(left, tl.trans(right), tl.zeros((left.shape[0], right.shape[0]), tl.float32), STREAM, EMULATED)


@triton.jit
def keys_of(first, rows, columns, window, CAUSAL: tl.constexpr, ROWS: tl.constexpr):
    """The first key that queries first…first + ROWS − 1 may attend to, and the end of them."""
    low, high = 0, columns
    last = tl.minimum(first + ROWS, rows)
    if window is not None:
        low = tl.maximum(first - window + 1, 0)
        high = tl.minimum(last + window - 1, columns)
    if CAUSAL:
        high = tl.minimum(last, columns)
    return low, high


@triton.jit
def masked(
    score,
    row,
    column,
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
    CAUSAL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    PER_QUERY: tl.constexpr,
):
    """Scores in units of ln 2 and what the mask adds to them, −inf where a query does not attend.

    `row` and `column` are the queries' and keys' numbers, one of them with a first and one with a last dimension of 1,
    so that both orders of a tile are served. A mask that is the same for all queries is read once for all of them.
    """
    attends = column < columns
    if CAUSAL:
        attends &= column <= row
    if window is not None:
        attends &= column > row - window
        if not CAUSAL:
            attends &= column < row + window
    if mask is not None:
        at, inside = column.to(tl.int64) * mask_key, column < columns
        if PER_QUERY:
            at += row.to(tl.int64) * mask_query
            inside &= row < rows
        given = load(mask + sequence * mask_sequence + head * mask_head, at, inside)
        if ADDITIVE:
            # The lowest number of float32 forbids all but among its like; a product with it must stay a number.
            score = tl.where(given == float("-inf"), given, tl.maximum(score + given * LOG2_E, LOWEST))
        else:
            attends &= given != 0
    return tl.where(attends, score, float("-inf"))


@triton.jit
def finite(highest):
    """What to subtract from scores: a query that attends to nothing has −inf for the highest, as all of its scores."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def keys_of_all(first, low, columns, CAUSAL: tl.constexpr, PLAIN: tl.constexpr, COLUMNS: tl.constexpr):
    """The end of the blocks of keys that every query from `first` on attends to whole; the others need `masked`."""
    end = low
    if PLAIN:
        end = columns // COLUMNS * COLUMNS
        if CAUSAL:
            end = tl.minimum(first, columns) // COLUMNS * COLUMNS
    return end


@triton.jit(do_not_specialize=ANY_LENGTH)
def attention_moments_forward(
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
    mean,
    covariance,
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
    """lse, mean and covariance of every query, as `reference.attention_moments`; one program per block of queries.

        m = max_j s_ij,  l = Σ e^(s_ij − m),  lse_i = m + log l,  s_ij = scale q_i·k_j + mask_ij
        mean_i = Σ e^(s_ij − m) (angle_i·turn_j − aim_i·k_j) / l
        covariance_i = Σ e^(s_ij − m) t_ij (v_j − o_i) / l,  t_ij = scale (tangent_i or q_i)·k_j

    where m grows from block to block of keys, and all sums shrink by e^(m before − m after).

    Inputs in groups as above: query, aim and tangent (or None) have HEAD channels and `rows` rows in each of `heads`
    heads; key and value have HEAD and VALUE channels and `columns` rows, and a head serves `groups` query heads; output
    has VALUE channels; reverse = −angle, whose heads are one, and turn have TURN: minus the form in the mean is then a
    sum of products, in one accumulator. mask (or None) has bytes, 0 where a query does not attend, or numbers to add if
    ADDITIVE, and differs between queries if PER_QUERY. window, or None.
    Outputs: lse and mean, numbers in float32, and covariance, as output. A query that attends to nothing has lse −inf,
    mean 0 and covariance 0. Products take their operands in the dtype of query; all else is float32.
    """
    sequence, head, block = sequence_head_block(rows, heads, BLOCK_ROWS)
    STREAM: tl.constexpr = query[0].dtype.element_ty
    scale = tl.cast(scale, tl.float32)
    numbers = (sequence * heads + head) * rows
    # The last queries of causal attention have the most keys: they start first.
    first = (tl.cdiv(rows, BLOCK_ROWS) - 1 - block) * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    q = load_rows(query, sequence, head, first, rows, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
    aims = load_rows(aim, sequence, head, first, rows, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
    back = load_rows(reverse, sequence, head, first, rows, STREAM, BLOCK_ROWS, TURN, TURN_TILE)
    if tangent is not None:
        t = load_rows(tangent, sequence, head, first, rows, STREAM, BLOCK_ROWS, HEAD, HEAD_TILE)
    highest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    form_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    moved_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    moved_values = tl.zeros((BLOCK_ROWS, VALUE_TILE), tl.float32)
    PLAIN: tl.constexpr = mask is None and window is None
    low, high = keys_of(first, rows, columns, window, CAUSAL, BLOCK_ROWS)
    middle = keys_of_all(first, low, columns, CAUSAL, PLAIN, BLOCK_COLUMNS)
    for MASKED in tl.static_range(0 if PLAIN else 1, 2):
        for start in range(middle if MASKED else low, high if MASKED else middle, BLOCK_COLUMNS):
            k = load_rows(key, sequence, head // groups, start, columns, STREAM, BLOCK_COLUMNS, HEAD, HEAD_TILE)
            v = load_rows(value, sequence, head // groups, start, columns, STREAM, BLOCK_COLUMNS, VALUE, VALUE_TILE)
            turns = load_rows(turn, sequence, head, start, columns, STREAM, BLOCK_COLUMNS, TURN, TURN_TILE)
            raw = products(q, k, STREAM, EMULATED)
            score = raw * (scale * LOG2_E)
            if MASKED:
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
            before, highest = highest, tl.maximum(highest, tl.max(score, 1))
            # Nothing to attend to so far: −inf − (−inf) would be NaN.
            above = highest
            if MASKED:
                above = finite(highest)
            weight = tl.exp2(score - above[:, None])
            keep = tl.exp2(before - above)
            against = product(aims, tl.trans(k), products(back, turns, STREAM, EMULATED), STREAM, EMULATED)
            moved = raw
            if tangent is not None:
                moved = products(t, k, STREAM, EMULATED)
            # What is summed is what is multiplied, so that its rounding meets v − o, not v and o on their own.
            moved = (weight * moved).to(STREAM)
            total = total * keep + tl.sum(weight, 1)
            form_sum = form_sum * keep - tl.sum(weight * against, 1)
            moved_sum = moved_sum * keep + tl.sum(moved.to(tl.float32), 1)
            moved_values = product(moved, v, moved_values * keep[:, None], STREAM, EMULATED)
    o = load_rows(output, sequence, head, first, rows, tl.float32, BLOCK_ROWS, VALUE, VALUE_TILE)
    attends = total > 0
    total = tl.where(attends, total, 1.0)
    share = tl.where(attends, 1.0 / total, 0.0)
    moved_values = (moved_values - moved_sum[:, None] * o) * (scale * share)[:, None]
    store(lse + numbers, row, row < rows, (highest + tl.log2(total)) * LN_2)
    store(mean + numbers, row, row < rows, form_sum * share)
    store_rows(covariance, sequence, head, first, rows, moved_values, BLOCK_ROWS, VALUE, VALUE_TILE)
