"""Copies of a row, each moved along one preconditioned probe, without a norm."""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.philox import times_probe
from ofa_kernels.kernels.tile import channels, load, row_and_tile, store


@triton.jit(do_not_specialize=["step", "seed_low", "seed_high"])
def displace_forward(
    stream,
    preconditioner,
    copies,
    width,
    stride_stream,
    stride_preconditioner,
    epsilon,
    step,
    seed_low,
    seed_high,
    SAMPLES: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    PER_ROW: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """copies[i] = z + ε p ⊙ ν_i, (SAMPLES, rows, width); one program per tile of a row.

    p is (rows, width), or one number per row if PER_ROW.
    """
    row, tile = row_and_tile(TILES)
    rows = tl.num_programs(0).to(tl.int64) // TILES
    channel = channels(tile, GROUPS)
    inside = channel < width
    z = load(stream + row * stride_stream, channel, inside)
    if PER_ROW:
        p = tl.load(preconditioner + row * stride_preconditioner).to(tl.float32) * tl.cast(epsilon, tl.float32)
    else:
        p = load(preconditioner + row * stride_preconditioner, channel, inside) * tl.cast(epsilon, tl.float32)
    for sample in range(SAMPLES):
        move = times_probe(p, tile, row, sample, (step, seed_low, seed_high), GROUPS, GAUSSIAN)
        store(copies + (sample * rows + row) * width, channel, inside, z + move)


@triton.jit(do_not_specialize=["step", "seed_low", "seed_high"])
def displace_backward(
    grad_copies,
    grad_stream,
    grad_preconditioner,
    width,
    stride_sample,
    stride_row,
    epsilon,
    step,
    seed_low,
    seed_high,
    SAMPLES: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """∂z = Σ_i g_i and ∂p = ε Σ_i ν_i ⊙ g_i (or None), both (rows, width); one program per tile of a row."""
    stride_sample = tl.cast(stride_sample, tl.int64)
    row, tile = row_and_tile(TILES)
    channel = channels(tile, GROUPS)
    inside = channel < width
    plain = tl.zeros((GROUPS, 32), tl.float32)
    signed = tl.zeros((GROUPS, 32), tl.float32)
    for sample in range(SAMPLES):
        g = load(grad_copies + sample * stride_sample + row * stride_row, channel, inside)
        plain += g
        if grad_preconditioner is not None:
            signed += times_probe(g, tile, row, sample, (step, seed_low, seed_high), GROUPS, GAUSSIAN)
    store(grad_stream + row * width, channel, inside, plain)
    if grad_preconditioner is not None:
        store(grad_preconditioner + row * width, channel, inside, signed * tl.cast(epsilon, tl.float32))
