"""Dot products of the recomputed probes with the changes they caused, and the branch output's squared length."""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.philox import times_probe
from ofa_kernels.kernels.tile import channels, load, row_and_tile, store


@triton.jit(do_not_specialize=["step", "seed_low", "seed_high"])
def contract_forward(
    base,
    copies,
    products,
    base_sqnorm,
    width,
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
    """products[i] = ν_iᵀ(copies[i] − base), (SAMPLES, rows), and base_sqnorm = ‖base‖², (rows,); a program per row."""
    stride_sample = tl.cast(stride_sample, tl.int64)
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    length = 0.0
    for tile in tl.static_range(TILES):
        channel = channels(tile, GROUPS)
        b = load(base + row * stride_base, channel, channel < width)
        length += tl.sum(b * b)
    tl.store(base_sqnorm + row, length)
    for sample in range(SAMPLES):
        product = 0.0
        for tile in tl.static_range(TILES):
            channel = channels(tile, GROUPS)
            inside = channel < width
            if TILES > 1:
                b = load(base + row * stride_base, channel, inside)
            change = load(copies + sample * stride_sample + row * stride_row, channel, inside) - b
            key = (step, seed_low, seed_high)
            product += tl.sum(times_probe(change, tile, row, sample, key, GROUPS, GAUSSIAN))
        tl.store(products + sample * rows + row, product)


@triton.jit(do_not_specialize=["step", "seed_low", "seed_high"])
def contract_backward(
    base,
    grad_products,
    grad_sqnorm,
    grad_base,
    grad_copies,
    width,
    stride_base,
    step,
    seed_low,
    seed_high,
    SAMPLES: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """∂copies[i] = ν_i g_i and ∂base = 2 grad_sqnorm · base − Σ_i ν_i g_i; a missing gradient is None."""
    row, tile = row_and_tile(TILES)
    rows = tl.num_programs(0).to(tl.int64) // TILES
    channel = channels(tile, GROUPS)
    inside = channel < width
    if grad_sqnorm is not None:
        grad = 2.0 * tl.load(grad_sqnorm + row) * load(base + row * stride_base, channel, inside)
    else:
        grad = tl.zeros((GROUPS, 32), tl.float32)
    if grad_products is not None:
        for sample in range(SAMPLES):
            own = tl.load(grad_products + sample * rows + row)
            own = times_probe(own, tile, row, sample, (step, seed_low, seed_high), GROUPS, GAUSSIAN)
            grad -= own
            store(grad_copies + (sample * rows + row) * width, channel, inside, own)
    store(grad_base + row * width, channel, inside, grad)
