"""Diagonals of summed Jacobians, from the recomputed probes and the changes they caused, in one read of the rows."""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.philox import times_probe
from ofa_kernels.kernels.tile import channels, load, row_and_tile, store


@triton.jit(do_not_specialize=["tokens", "parts", "step", "seed_low", "seed_high"])
def probed_diagonal_rows(
    base,
    copies,
    weights,
    sums,
    width,
    tokens,
    parts,
    stride_base,
    stride_sample,
    stride_row,
    step,
    seed_low,
    seed_high,
    SAMPLES: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """Σ_t w_t Σ_i ν_i ⊙ (copies[i] − base) over a part of a sequence's tokens, in their order.

    One program per sequence, part and tile; base is (sequences · tokens, width), copies (SAMPLES, sequences · tokens,
    width), weights (sequences · tokens,), sums (sequences · parts, width) float32.
    """
    stride_sample = tl.cast(stride_sample, tl.int64)
    program, tile = row_and_tile(TILES)
    sequence, part = program // parts, program % parts
    share = tl.cdiv(tokens, parts)
    channel = channels(tile, GROUPS)
    inside = channel < width
    total = tl.zeros((GROUPS, 32), tl.float32)
    for token in range(part * share, tl.minimum((part + 1) * share, tokens)):
        row = sequence * tokens + token
        weight = tl.load(weights + row).to(tl.float32)
        b = load(base + row * stride_base, channel, inside)
        for sample in range(SAMPLES):
            change = load(copies + sample * stride_sample + row * stride_row, channel, inside) - b
            total += times_probe(weight * change, tile, row, sample, (step, seed_low, seed_high), GROUPS, GAUSSIAN)
    store(sums + program * width, channel, inside, total)
