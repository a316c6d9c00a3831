"""Shared by the row kernels: the tiles of a row, their loads and sums, and the row's moments.

A row z of `width` channels is one tile (GROUPS, 32), or several if it does not fit in registers. Every function keeps
channels outside the row at 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_and_tile(TILES: tl.constexpr):
    """The program's row and tile, with one program per tile."""
    program = tl.program_id(0).to(tl.int64)
    return program // TILES, (program % TILES).to(tl.int32)


@triton.jit
def channels(tile, GROUPS: tl.constexpr):
    """Channel indices of a tile, (GROUPS, 32)."""
    return (tile * GROUPS + tl.arange(0, GROUPS)[:, None]) * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def load(pointer, channel, inside):
    """Values of a tile in float32, from any dtype."""
    return tl.load(pointer + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_if_any(vector, channel, inside):
    """As `load`; 0 if the vector is None."""
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
    """Store a tile, cast to the pointer's dtype."""
    tl.store(pointer + channel, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_again(pointer, channel, inside):
    """As `load`, for values loaded before: reads the cache instead of keeping registers.

    The eviction policy keeps the compiler from merging both loads.
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
    """Merge a tile into the mean and sum of squared deviations of the previous tiles.

    Chan, Golub and LeVeque's update: accurate also if the mean is large against the deviations.
    """
    if CENTRED:
        mean, squares, z = merge_mean(z, inside, tile, mean, squares, width, GROUPS)
    return mean, squares + tl.sum(z * z)


@triton.jit
def merge_moments_and_sum(
    z, beside, inside, tile, mean, squares, width, GROUPS: tl.constexpr, CENTRED: tl.constexpr
):  # fmt: skip
    """As `merge_moments`, and the sum of a second tile, `beside`, in the same reduction."""
    if CENTRED:
        mean, squares, z = merge_mean(z, inside, tile, mean, squares, width, GROUPS)
    more, of_beside = sum_two(z * z, beside)
    return mean, squares + more, of_beside


@triton.jit
def merge_mean(z, inside, tile, mean, squares, width, GROUPS: tl.constexpr):
    """Updated mean, squares with the term of the means' gap, and z minus its own tile's mean."""
    seen = tile * GROUPS * 32
    count = tl.minimum(width - seen, GROUPS * 32)
    tile_mean = tl.sum(z) / count
    gap = tile_mean - mean
    mean += gap * count / (seen + count)
    squares += gap * gap * seen * count / (seen + count)
    return mean, squares, tl.where(inside, z - tile_mean, 0.0)


@triton.jit
def sum_two(a, b):
    """Sums of two tiles with one sync of the program's threads; `tl.sum` of each would sync twice.

    Not `tl.reduce` of a tuple, which the interpreter evaluates element by element.
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
