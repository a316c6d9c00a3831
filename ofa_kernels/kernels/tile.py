"""What the kernels share: the tile of a row, its sums, its norm, and the norm's gradient.

A row z of `width` channels is one tile (GROUPS, 32), or several where it does not fit in the registers. Channels
outside of the row are 0 in every tile and stay 0 through every function here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def channels(tile, GROUPS: tl.constexpr):
    """Channel numbers of a tile, (GROUPS, 32)."""
    return (tile * GROUPS + tl.arange(0, GROUPS)[:, None]) * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def load(pointer, channel, inside):
    """Values of a tile in float32, whatever they are stored in."""
    return tl.load(pointer + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_scale(weight, channel, inside, OFFSET: tl.constexpr):
    """γ = OFFSET + weight."""
    return tl.where(inside, load(weight, channel, inside) + OFFSET, 0.0)


@triton.jit
def store(pointer, channel, inside, values):
    """The one cast of a result, to what it is stored in."""
    tl.store(pointer + channel, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def normalize(z, inside, width, eps, CENTRED: tl.constexpr):
    """(ẑ, 1/σ) of a row that is one tile: ẑ = (z − μ)/σ, σ² = mean((z − μ)²) + eps, μ = 0 unless CENTRED."""
    if CENTRED:
        z = tl.where(inside, z - tl.sum(z) / width, 0.0)
    rstd = tl.rsqrt(tl.sum(z * z) / width + eps)
    return z * rstd, rstd


@triton.jit
def normalize_gradient(grad, hat, inside, rstd, width, CENTRED: tl.constexpr):
    """Gradient in z of ⟨grad, ẑ⟩: (g − ẑ·mean(g ẑ) − mean(g))/σ, the last term only if CENTRED."""
    along = tl.sum(grad * hat) / width
    if CENTRED:
        grad = tl.where(inside, grad - tl.sum(grad) / width, 0.0)
    return (grad - hat * along) * rstd


@triton.jit
def merge_moments(z, inside, seen, mean, squares, count, CENTRED: tl.constexpr):
    """Mean and sum of squared deviations of `seen` channels, with `count` more that a tile holds.

    Chan, Golub and LeVeque's update, which loses nothing where the mean is large against the deviations.
    """
    if CENTRED:
        tile_mean = tl.sum(z) / count
        z = tl.where(inside, z - tile_mean, 0.0)
        gap = tile_mean - mean
        mean += gap * count / (seen + count)
        squares += gap * gap * seen * count / (seen + count)
    return mean, squares + tl.sum(z * z)
