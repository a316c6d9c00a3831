"""The probes of `ofa_kernels.philox`, computed in registers: the same counter, key and channel layout."""

from __future__ import annotations

import triton
import triton.language as tl

TURN = tl.constexpr(6.283185307179586)
UNIT = tl.constexpr(2.0**-32)


@triton.jit
def probe_tile(tile, row, sample, key, GROUPS: tl.constexpr, GAUSSIAN: tl.constexpr):
    """ν of one tile, (GROUPS, 32) float32: Rademacher signs, or standard normal values.

    `key` is (step, low word of the seed, high word of the seed), as `ofa_kernels.ops.launching.key` makes it.
    """
    if GAUSSIAN:
        return _normals(tile, row, sample, key, GROUPS)
    return _signs(tile, row, sample, key, GROUPS)


@triton.jit
def _signs(tile, row, sample, key, GROUPS: tl.constexpr):
    # One counter has a bit for each of 128 channels: four groups, a word each. The bit becomes the sign of 1.0.
    w0, w1, w2, w3 = _words(tile, row, sample, key, GROUPS // 4)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (GROUPS, 1))
    to_the_top = (31 - tl.arange(0, 32))[None, :].to(tl.uint32)
    return (((words << to_the_top) & 0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _normals(tile, row, sample, key, GROUPS: tl.constexpr):
    # One counter has two Box-Muller pairs: four channels.
    w0, w1, w2, w3 = _words(tile, row, sample, key, GROUPS * 8)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (GROUPS, 32))


@triton.jit
def _box_muller(first, second):
    radius = tl.sqrt(-2.0 * tl.log((first.to(tl.float32) + 0.5) * UNIT))
    angle = TURN * ((second.to(tl.float32) + 0.5) * UNIT)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _words(tile, row, sample, key, COUNTERS: tl.constexpr):
    """The four words of each of a tile's counters (channel block, row, sample, step) under the seed (low, high)."""
    step, seed_low, seed_high = key
    block = (tile * COUNTERS + tl.arange(0, COUNTERS)).to(tl.uint32)
    same = tl.zeros_like(block)
    return tl.philox_impl(
        block,
        same + tl.cast(row, tl.uint32),
        same + tl.cast(sample, tl.uint32),
        same + tl.cast(step, tl.uint32),
        same + tl.cast(seed_low, tl.uint32),
        same + tl.cast(seed_high, tl.uint32),
    )
