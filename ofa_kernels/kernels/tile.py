"""What the kernels share: the tile of a row, its sums, its norm, and the norm's gradient.

A row z of `width` channels is one tile (GROUPS, 32), or several where it does not fit in the registers. Channels
outside of the row are 0 in every tile and stay 0 through every function here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_and_tile(TILES: tl.constexpr):
    """Which row and which of its tiles this program works on, where there is one program for each tile."""
    program = tl.program_id(0).to(tl.int64)
    return program // TILES, (program % TILES).to(tl.int32)


@triton.jit
def channels(tile, GROUPS: tl.constexpr):
    """Channel numbers of a tile, (GROUPS, 32)."""
    return (tile * GROUPS + tl.arange(0, GROUPS)[:, None]) * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def load(pointer, channel, inside):
    """Values of a tile in float32, whatever they are stored in."""
    return tl.load(pointer + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_if_any(vector, channel, inside):
    """As `load`; 0 where there is no vector."""
    return load(vector, channel, inside) if vector is not None else 0.0


@triton.jit
def load_scale(weight, channel, inside, OFFSET: tl.constexpr):
    """γ = OFFSET + weight."""
    scale = load(weight, channel, inside)
    if OFFSET != 0.0:
        scale = tl.where(inside, scale + OFFSET, 0.0)
    return scale


@triton.jit
def store(pointer, channel, inside, values):
    """The one cast of a result, to what it is stored in."""
    tl.store(pointer + channel, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_again(pointer, channel, inside):
    """As `load`, for what was loaded before: from the cache, rather than from registers kept in between.

    The eviction policy says that nobody reads it a third time, and keeps the compiler from merging both loads.
    """
    return tl.load(pointer + channel, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def add_in_memory(pointer, channel, inside, addend):
    """Add to a tile that only this program writes."""
    tl.store(pointer + channel, tl.load(pointer + channel, mask=inside, other=0.0) + addend, mask=inside)


@triton.jit
def row_moments(row, width, eps, GROUPS: tl.constexpr, TILES: tl.constexpr, CENTRED: tl.constexpr):
    """(μ, 1/σ) of a row: σ² = mean((z − μ)²) + eps, μ = 0 unless CENTRED."""
    mean, squares = 0.0, 0.0
    for tile in range(TILES):
        channel = channels(tile, GROUPS)
        inside = channel < width
        mean, squares = merge_moments(load(row, channel, inside), inside, tile, mean, squares, width, GROUPS, CENTRED)
    return mean, tl.rsqrt(squares / width + eps)


@triton.jit
def merge_moments(z, inside, tile, mean, squares, width, GROUPS: tl.constexpr, CENTRED: tl.constexpr):
    """Mean and sum of squared deviations of the tiles before this one, with those of this one.

    Chan, Golub and LeVeque's update, which loses nothing where the mean is large against the deviations.
    """
    if CENTRED:
        mean, squares, z = merge_mean(z, inside, tile, mean, squares, width, GROUPS)
    return mean, squares + tl.sum(z * z)


@triton.jit
def merge_moments_and_sum(
    z, beside, inside, tile, mean, squares, width, GROUPS: tl.constexpr, CENTRED: tl.constexpr
):  # fmt: skip
    """As `merge_moments`, and the sum of a tile `beside` z in the same exchange."""
    if CENTRED:
        mean, squares, z = merge_mean(z, inside, tile, mean, squares, width, GROUPS)
    more, of_beside = sum_two(z * z, beside)
    return mean, squares + more, of_beside


@triton.jit
def merge_mean(z, inside, tile, mean, squares, width, GROUPS: tl.constexpr):
    """The mean of all tiles so far; what the gap between those before and this adds to the squares; z less its mean."""
    seen = tile * GROUPS * 32
    count = tl.minimum(width - seen, GROUPS * 32)
    tile_mean = tl.sum(z) / count
    gap = tile_mean - mean
    mean += gap * count / (seen + count)
    squares += gap * gap * seen * count / (seen + count)
    return mean, squares, tl.where(inside, z - tile_mean, 0.0)


@triton.jit
def sum_two(a, b):
    """Sums of two tiles. The threads of a program wait for each other once, where `tl.sum` of each would twice.

    Not `tl.reduce` of a tuple, which the interpreter walks through element by element.
    """
    return tl.split(tl.sum(tl.join(tl.sum(a, axis=1), tl.sum(b, axis=1)), axis=0))


@triton.jit
def sum_three(a, b, c):
    """As `sum_two`, of three tiles."""
    of_c = tl.sum(c, axis=1)
    sum_a, sum_b, sum_c, _ = _sum_of_groups(tl.sum(a, axis=1), tl.sum(b, axis=1), of_c, tl.zeros_like(of_c))
    return sum_a, sum_b, sum_c


@triton.jit
def sum_four(a, b, c, d):
    """As `sum_two`, of four tiles."""
    return _sum_of_groups(tl.sum(a, axis=1), tl.sum(b, axis=1), tl.sum(c, axis=1), tl.sum(d, axis=1))


@triton.jit
def _sum_of_groups(a, b, c, d):
    first, second = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), axis=0))
    sum_a, sum_b = tl.split(first)
    sum_c, sum_d = tl.split(second)
    return sum_a, sum_b, sum_c, sum_d
