"""The probes of `ofa_kernels.philox`, computed in registers with the same counter, key and channel layout."""

from __future__ import annotations

import triton
import triton.language as tl

TURN = tl.constexpr(6.283185307179586)
UNIT = tl.constexpr(2.0**-32)


@triton.jit
def times_probe(values, tile, row, sample, key, GROUPS: tl.constexpr, GAUSSIAN: tl.constexpr):
    """One tile of values ⊙ ν, (GROUPS, 32) float32, with ν Rademacher signs or standard normal values.

    `values` is a tile or one float32 number, `key` is that of `ofa_kernels.ops.launching.key`.
    """
    if GAUSSIAN:
        found = values * _normals(tile, row, sample, key, GROUPS)
    else:
        flipped = values.to(tl.uint32, bitcast=True) ^ _sign_bits(tile, row, sample, key, GROUPS)
        found = flipped.to(tl.float32, bitcast=True)
    return found


@triton.jit
def _sign_bits(tile, row, sample, key, GROUPS: tl.constexpr):
    # One counter has a bit for each of 128 channels: four groups, a word each. Four threads compute the same words:
    # sharing them would take shared memory and six barriers.
    group = tl.arange(0, GROUPS)
    # Always 0, which the compiler cannot know: it would hoist the first rounds out of the loop over rows, and spill.
    nothing = (tl.cast(row, tl.int64) >> 62).to(tl.int32)
    w0, w1, w2, w3 = _words(tile * (GROUPS // 4) + group // 4 + nothing, row, sample, key)
    even, second_half = group % 2 == 0, group % 4 >= 2
    words = tl.where(second_half, tl.where(even, w2, w3), tl.where(even, w0, w1))[:, None]
    to_the_top = (31 - tl.arange(0, 32))[None, :].to(tl.uint32)
    return (words << to_the_top) & 0x80000000


@triton.jit
def _normals(tile, row, sample, key, GROUPS: tl.constexpr):
    # One counter makes two Box-Muller pairs: four channels.
    w0, w1, w2, w3 = _words(tile * (GROUPS * 8) + tl.arange(0, GROUPS * 8), row, sample, key)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (GROUPS, 32))


@triton.jit
def _box_muller(first, second):
    radius = tl.sqrt(-2.0 * tl.log((first.to(tl.float32) + 0.5) * UNIT))
    angle = TURN * ((second.to(tl.float32) + 0.5) * UNIT)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _words(block, row, sample, key):
    """The four words of each counter (channel block, row, sample, step) under the seed (low, high)."""
    step, seed_low, seed_high = key
    block = block.to(tl.uint32)
    same = tl.zeros_like(block)
    return tl.philox_impl(
        block,
        same + tl.cast(row, tl.uint32),
        same + tl.cast(sample, tl.uint32),
        same + tl.cast(step, tl.uint32),
        same + tl.cast(seed_low, tl.uint32),
        same + tl.cast(seed_high, tl.uint32),
    )
