"""Shared by the sweeps over an attention's scores: tiles of heads, products, and which keys a query attends to.

Tensors come as groups. A tensor with heads is the tuple (pointer, strides of a sequence, of a head, of a row), with a
dense last dimension. A mask is the tuple (pointer, strides of a sequence, of a head, of a query, of a key), where a
stride of 0 broadcasts. Tiles are as wide as the next power of two; channels past the head's are 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.tile import load, store

LOG2_E = tl.constexpr(1.4426950408889634)
"""Weights are computed as 2ˣ, one instruction; eˣ would take one more product."""
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def sequence_head_block(count, heads, BLOCK: tl.constexpr):
    """The program's sequence, head and block of the head's `count` rows; a head's blocks are consecutive programs."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(count, BLOCK)
    return program // blocks // heads, program // blocks % heads, (program % blocks).to(tl.int32)


@triton.jit
def head_of(tensor, sequence, head):
    """Pointer to the first row of a head."""
    return tensor[0] + sequence * tensor[1] + head * tensor[2]


@triton.jit
def load_rows(
    tensor, sequence, head, first, count,
    TYPE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rows first…first + ROWS − 1 of a head as TYPE, 0 outside its `count` rows and WIDTH channels."""
    # `load` upcasts; the compiler removes both casts if the tensor already has TYPE.
    row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, TILE)[None, :]
    inside = (first + row < count) & (channel < WIDTH)
    start = head_of(tensor, sequence, head) + tl.cast(first, tl.int64) * tensor[3]
    return load(start, row * tensor[3] + channel, inside).to(TYPE)


@triton.jit
def store_rows(
    tensor, sequence, head, first, count, values, ROWS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Write the rows that `load_rows` reads."""
    row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, TILE)[None, :]
    inside = (first + row < count) & (channel < WIDTH)
    start = head_of(tensor, sequence, head) + tl.cast(first, tl.int64) * tensor[3]
    store(start, row * tensor[3] + channel, inside, values)


@triton.jit
def product(left, right, total, TYPE: tl.constexpr, EMULATED: tl.constexpr):
    """`total` + `left` `right`, with operands rounded to TYPE and summed in float32."""
    left, right = left.to(TYPE), right.to(TYPE)
    if EMULATED:
        # Triton's interpreter would multiply bfloat16 as integers.
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def products(left, right, TYPE: tl.constexpr, EMULATED: tl.constexpr):
    """Dot products of every row of `left` with every row of `right`."""
    return product(left, tl.trans(right), tl.zeros((left.shape[0], right.shape[0]), tl.float32), TYPE, EMULATED)


@triton.jit
def keys_of(first, tokens, window, CAUSAL: tl.constexpr, ROWS: tl.constexpr):
    """The range (first key, end) that queries first…first + ROWS − 1 may attend to."""
    low, high = 0, tokens
    last = tl.minimum(first + ROWS, tokens)
    if window is not None:
        low = tl.maximum(first - window + 1, 0)
        high = tl.minimum(last + window - 1, tokens)
    if CAUSAL:
        high = last
    return low, high


@triton.jit
def queries_of(first, tokens, window, CAUSAL: tl.constexpr, COLUMNS: tl.constexpr):
    """The range (first query, end) that may attend to one of the keys first…first + COLUMNS − 1."""
    low, high = 0, tokens
    if window is not None:
        low = tl.maximum(first - window + 1, 0)
        high = tl.minimum(tl.minimum(first + COLUMNS, tokens) + window - 1, tokens)
    if CAUSAL:
        low = first
    return low, high


@triton.jit
def slope_of_cap(score, softcap):
    """t·tanh(s/t) and its slope 1 − tanh²(s/t)."""
    cap = tl.cast(softcap, tl.float32)
    x = score / cap
    square = x * x
    # 1 − tanh = 2/(1 + e^2|x|) loses relative accuracy near 0; five terms of the series do not.
    small = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - small) / (1.0 + small)
    series = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))
    series = 1.0 + square * (-1.0 / 3.0 + square * series)
    tanh = tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0.0, -large, large))
    return cap * tanh, 1.0 - tanh * tanh


@triton.jit
def masked(
    score, row, column, tokens, sequence, head, mask, window,
    CAUSAL: tl.constexpr, ADDITIVE: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """Scores in units of ln 2 plus the mask, −inf where a query does not attend.

    `row` and `column` are the indices of queries and keys, broadcast against the scores: either order of a tile, or its
    diagonal. A mask that is the same for all queries is read once.
    """
    attends = (column < tokens) & (row < tokens)
    inside = column < tokens
    if CAUSAL:
        attends &= column <= row
    if window is not None:
        attends &= column > row - window
        if not CAUSAL:
            attends &= column < row + window
    if mask is not None:
        at = column.to(tl.int64) * mask[4]
        if PER_QUERY:
            at += row.to(tl.int64) * mask[3]
            inside &= row < tokens
        given = load(mask[0] + sequence * mask[1] + head * mask[2], at, inside)
        if ADDITIVE:
            # Masks use float32's lowest number, which × log₂e would overflow to −inf and give NaN in fully masked rows.
            score = tl.where(given == float("-inf"), given, tl.maximum(score + given * LOG2_E, LOWEST))
        else:
            attends &= given != 0
    return tl.where(attends, score, float("-inf"))
