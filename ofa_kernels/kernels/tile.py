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
    return tl.where(inside, load(weight, channel, inside) + OFFSET, 0.0)


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
        seen = tile * GROUPS * 32
        count = tl.minimum(width - seen, GROUPS * 32)
        tile_mean = tl.sum(z) / count
        z = tl.where(inside, z - tile_mean, 0.0)
        gap = tile_mean - mean
        mean += gap * count / (seen + count)
        squares += gap * gap * seen * count / (seen + count)
    return mean, squares + tl.sum(z * z)
