"""Token sums of an MLP's slopes, and its change projected onto a few rows, in one read of the pre-activations."""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.attention_scores import product
from ofa_kernels.kernels.tile import load, load_if_any, store

ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_ZERO = tl.constexpr(0.3989422804014327)
"""1/√(2π)."""
INNER = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)
"""tanh's argument in gelu_tanh is √(2/π) (x + 0.044715 x³)."""


@triton.jit(do_not_specialize=["weights", "tokens", "runs"])
def mlp_curvature_tokens(
    gate,
    up,
    weights,
    read,
    gate_shift,
    up_shift,
    sums,
    moved,
    tokens,
    width,
    runs,
    ACTIVATION: tl.constexpr,
    EMULATED: tl.constexpr,
    READ: tl.constexpr,
    READ_TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Slopes of φ(g) ⊙ u summed over a run of tokens for one tile of channels, and the tile's part of the change.

        sums[run] = Σ_i w_i φ'(g_i) ⊙ u_i and Σ_i w_i φ(g_i)
        moved[tile, i] = read · ( φ'(g_i) ⊙ u_i ⊙ (g_i − b_g) + φ(g_i) ⊙ (u_i − b_u) )

    Inputs: gate = g and up = u (or None: u = 1), groups (pointer, stride of a sequence, of a token); weights = w, the
    group (pointer, stride of a sequence); read, the group (pointer, stride of a sequence, of a row), or None; the
    shifts b_g and b_u (width,), or None.
    Outputs: sums, (runs, 1 or 2, B, width), and moved, (tiles, B, tokens, READ), in float32.
    """
    STREAM: tl.constexpr = tl.bfloat16 if gate[0].dtype.element_ty == tl.bfloat16 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(width, BLOCK_COLUMNS)
    tile, run, sequence = program % tiles, program // tiles % runs, program // tiles // runs
    sequences = tl.num_programs(0).to(tl.int64) // (tiles * runs)
    channel = (tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    inside = channel < width
    gate_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    up_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    b_g = load_if_any(gate_shift, channel, inside)
    b_u = load_if_any(up_shift, channel, inside)
    if read is not None:
        line = tl.arange(0, READ_TILE)[:, None]
        rows_read = load(read[0] + sequence * read[1], line * read[2] + channel, (line < READ) & inside)
    blocks = tl.cdiv(tl.cdiv(tokens, BLOCK_ROWS), runs)
    low = (run * blocks * BLOCK_ROWS).to(tl.int32)
    for start in range(low, tl.minimum(low + blocks * BLOCK_ROWS, tokens), BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        at, within = row.to(tl.int64)[:, None], (row < tokens)[:, None]
        w = load(weights[0] + sequence * weights[1], at, within)
        g = load(gate[0] + sequence * gate[1], at * gate[2] + channel, within & inside)
        phi, slope = curve(g, ACTIVATION)
        change = slope * (g - b_g)
        if up is not None:
            u = load(up[0] + sequence * up[1], at * up[2] + channel, within & inside)
            slope *= u
            change = change * u + phi * (u - b_u)
            up_sum += w * phi
        gate_sum += w * slope
        if read is not None:
            change = tl.where(within & inside, change, 0.0)
            found = product(
                change, tl.trans(rows_read), tl.zeros((BLOCK_ROWS, READ_TILE), tl.float32), STREAM, EMULATED
            )
            reading = tl.arange(0, READ_TILE)[None, :]
            target = moved + ((tile * sequences + sequence) * tokens) * READ
            store(target, at * READ + reading, within & (reading < READ), found)
    PARTS: tl.constexpr = 1 if up is None else 2
    target = sums + (run * PARTS * sequences + sequence) * width
    store(target, channel, inside, tl.sum(gate_sum, 0)[None, :])
    if up is not None:
        store(target + sequences * width, channel, inside, tl.sum(up_sum, 0)[None, :])


@triton.jit(do_not_specialize=["first_count", "second_count"])
def add_partials(
    first,
    first_total,
    first_size,
    first_count,
    second,
    second_total,
    second_size,
    second_count,
    BLOCK: tl.constexpr,
):
    """Sums of (count, size) float32 over the first dimension, in its order, for two tensors in one launch.

    The first programs sum the blocks of `first`, the others those of `second`, which may be None.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(first_size, BLOCK)
    if program < blocks:
        _add(first, first_total, first_size, first_count, program, BLOCK)
    elif second is not None:
        _add(second, second_total, second_size, second_count, program - blocks, BLOCK)


@triton.jit
def _add(parts, total, size, count, block, BLOCK: tl.constexpr):
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    found = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        found += load(parts + part * tl.cast(size, tl.int64), at, inside)
    store(total, at, inside, found)


@triton.jit
def curve(x, ACTIVATION: tl.constexpr):
    """φ and φ' of an activation, named as in `reference.ACTIVATIONS`."""
    if ACTIVATION == "silu":
        found = _swish(x, 1.0)
    elif ACTIVATION == "quick_gelu":
        found = _swish(x, 1.702)
    elif ACTIVATION == "gelu":
        found = _gelu(x)
    elif ACTIVATION == "gelu_tanh":
        found = _gelu_tanh(x)
    else:
        found = _relu(x)
    return found


@triton.jit
def _swish(x, FACTOR: tl.constexpr):
    p, q = _logistic(x * FACTOR)
    return x * p, p + x * FACTOR * (p * q)


@triton.jit
def _gelu(x):
    p = 0.5 + 0.5 * tl.erf(x * ROOT_HALF)
    return x * p, p + x * tl.exp(-0.5 * x * x) * DENSITY_AT_ZERO


@triton.jit
def _gelu_tanh(x):
    # (1 + tanh y)/2 is p, the logistic function of 2y: p' = 2pq y' with q = 1 − p.
    square = x * x
    p, q = _logistic(x * (2.0 * INNER) * (square * CUBIC + 1.0))
    # pq underflows to 0 before the powers of x overflow.
    return x * p, p + x * (2.0 * p * q * (square * (3.0 * INNER * CUBIC) + INNER))


@triton.jit
def _relu(x):
    # `x <= 0` and not `x > 0`, so that NaN stays NaN; the slope at 0 is 0, as in PyTorch.
    return tl.where(x <= 0.0, 0.0, x), tl.where(x > 0.0, 1.0, 0.0)


@triton.jit
def _logistic(x):
    """σ(x) and 1 − σ(x), without overflow or cancellation."""
    small = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + small)
    small *= large
    return tl.where(x < 0.0, small, large), tl.where(x < 0.0, large, small)
