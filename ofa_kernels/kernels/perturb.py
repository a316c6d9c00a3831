"""Normalized copies of a row, each moved along one preconditioned probe: all copies from one read of the stream."""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.philox import probe_tile
from ofa_kernels.kernels.tile import (
    add_in_memory,
    channels,
    load,
    load_again,
    load_scale,
    merge_moments,
    row_moments,
    store,
)


@triton.jit(do_not_specialize=["step", "seed_low", "seed_high"])
def perturb_forward(
    stream,
    undisturbed,
    weight,
    bias,
    copies,
    width,
    stride_stream,
    stride_undisturbed,
    eps,
    epsilon,
    step,
    seed_low,
    seed_high,
    SAMPLES: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """copies[i] = N(z + ε γ/σ ⊙ ν_i), (SAMPLES, rows, width); one program per row, one read of z.

    With `undisturbed`, (rows, width), the copies stand behind a copy of it: (1 + SAMPLES, rows, width).
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    eps, epsilon = tl.cast(eps, tl.float32), tl.cast(epsilon, tl.float32)
    key, norm = (step, seed_low, seed_high), (width, eps)
    out = copies + row * width
    if undisturbed is not None:
        for tile in range(TILES):
            channel = channels(tile, GROUPS)
            inside = channel < width
            store(out, channel, inside, load(undisturbed + row * stride_undisturbed, channel, inside))
        out += rows * width
    z_row = stream + row * stride_stream
    _, r = row_moments(z_row, width, eps, GROUPS, TILES, CENTRED)
    shift = epsilon * r
    for sample in range(SAMPLES):
        into = out + sample * rows * width
        store_perturbed(
            into, z_row, weight, bias, row, sample, key, shift, norm, GROUPS, TILES, CENTRED, OFFSET, GAUSSIAN
        )


@triton.jit
def store_perturbed(
    out, z_row, weight, bias, row, sample, key, shift, norm, GROUPS: tl.constexpr, TILES: tl.constexpr,
    CENTRED: tl.constexpr, OFFSET: tl.constexpr, GAUSSIAN: tl.constexpr
):  # fmt: skip
    """Write γ ⊙ ẑ' + β for z' = z + shift·γ ⊙ ν."""
    width, eps = norm
    mean, squares = 0.0, 0.0
    for tile in range(TILES):
        z, _, _, _, inside = perturbed(tile, z_row, weight, row, sample, key, shift, width, GROUPS, OFFSET, GAUSSIAN)
        mean, squares = merge_moments(z, inside, tile, mean, squares, width, GROUPS, CENTRED)
    r = tl.rsqrt(squares / width + eps)
    for tile in range(TILES):
        z, _, scale, channel, inside = perturbed(
            tile, z_row, weight, row, sample, key, shift, width, GROUPS, OFFSET, GAUSSIAN
        )
        y = (z - mean) * r * scale
        if bias is not None:
            y += load(bias, channel, inside)
        store(out, channel, inside, y)


@triton.jit
def perturbed(
    tile, z_row, weight, row, sample, key, shift, width, GROUPS: tl.constexpr, OFFSET: tl.constexpr,
    GAUSSIAN: tl.constexpr
):  # fmt: skip
    """(z', ν, γ) of one tile, z' = z + shift·γ ⊙ ν; its channels, and which of them exist."""
    channel = channels(tile, GROUPS)
    inside = channel < width
    scale = load_scale(weight, channel, inside, OFFSET)
    nu = probe_tile(tile, row, sample, key, GROUPS, GAUSSIAN)
    # Not (shift·γ)·ν: the compiler would keep shift·γ in registers from sample to sample.
    return load(z_row, channel, inside) + scale * (shift * nu), nu, scale, channel, inside


@triton.jit(do_not_specialize=["rows", "step", "seed_low", "seed_high"])
def perturb_backward(
    stream,
    weight,
    grad_copies,
    grad_stream,
    partial_weight,
    partial_bias,
    rows,
    width,
    stride_stream,
    stride_sample,
    stride_row,
    eps,
    epsilon,
    step,
    seed_low,
    seed_high,
    SAMPLES: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """Gradients of z, γ and β; each program takes a run of rows and computes the same probes again.

    SLOTS is the power of two that holds SAMPLES. partial_weight and partial_bias (or None) are those of
    `norm_step_backward`.
    """
    program = tl.program_id(0).to(tl.int64)
    eps, epsilon = tl.cast(eps, tl.float32), tl.cast(epsilon, tl.float32)
    key, norm = (step, seed_low, seed_high), (width, eps)
    stride_sample = tl.cast(stride_sample, tl.int64)
    share = tl.cdiv(rows, tl.num_programs(0))
    weight_sum = tl.zeros((GROUPS, 32), tl.float32)
    bias_sum = tl.zeros((GROUPS, 32), tl.float32)
    for row in range(program * share, tl.minimum((program + 1) * share, rows)):
        z_row, g_row = stream + row * stride_stream, grad_copies + row * stride_row
        mu, r = row_moments(z_row, width, eps, GROUPS, TILES, CENTRED)
        shift = epsilon * r
        statistics, pull = perturbed_statistics(
            z_row, g_row, stride_sample, weight, row, key, shift, mu, norm, SAMPLES, SLOTS, GROUPS, TILES, CENTRED,
            OFFSET, GAUSSIAN
        )  # fmt: skip
        for tile in range(TILES):
            channel = channels(tile, GROUPS)
            inside = channel < width
            if TILES > 1:
                weight_sum = tl.zeros((GROUPS, 32), tl.float32)
                bias_sum = tl.zeros((GROUPS, 32), tl.float32)
            grad, of_scale, g = perturbed_gradient(
                tile, z_row, g_row, stride_sample, weight, row, key, shift, width, statistics, SAMPLES, SLOTS, GROUPS,
                OFFSET, GAUSSIAN
            )  # fmt: skip
            weight_sum += of_scale
            bias_sum += g
            if TILES > 1:
                add_in_memory(partial_weight + program * width, channel, inside, weight_sum)
                if partial_bias is not None:
                    add_in_memory(partial_bias + program * width, channel, inside, bias_sum)
            # shift = ε/σ and ∂(1/σ)/∂z = −ẑ/(σ² d).
            hat = tl.where(inside, (load(z_row, channel, inside) - mu) * r, 0.0)
            store(grad_stream + row * width, channel, inside, grad - hat * (epsilon * pull * r * r / width))
    if TILES == 1:
        channel = channels(0, GROUPS)
        store(partial_weight + program * width, channel, channel < width, weight_sum)
        if partial_bias is not None:
            store(partial_bias + program * width, channel, channel < width, bias_sum)


@triton.jit
def perturbed_gradient(
    tile, z_row, g_row, stride_sample, weight, row, key, shift, width, statistics, SAMPLES: tl.constexpr,
    SLOTS: tl.constexpr, GROUPS: tl.constexpr, OFFSET: tl.constexpr, GAUSSIAN: tl.constexpr
):  # fmt: skip
    """Σ over the samples, for one tile, of the gradients of ⟨g, γ ⊙ ẑ'⟩: in z', in γ (through scale and move), in β."""
    rstds, means, alongs, throughs = statistics
    of_stream = tl.zeros((GROUPS, 32), tl.float32)
    of_scale = tl.zeros((GROUPS, 32), tl.float32)
    of_shift = tl.zeros((GROUPS, 32), tl.float32)
    for sample in range(SAMPLES):
        here = tl.arange(0, SLOTS) == sample
        rstd, mean = tl.sum(tl.where(here, rstds, 0.0)), tl.sum(tl.where(here, means, 0.0))
        along, through = tl.sum(tl.where(here, alongs, 0.0)), tl.sum(tl.where(here, throughs, 0.0))
        z, nu, scale, channel, inside = perturbed(
            tile, z_row, weight, row, sample, key, shift, width, GROUPS, OFFSET, GAUSSIAN
        )
        g = load_again(g_row + sample * stride_sample, channel, inside)
        hat = (z - mean) * rstd
        own = tl.where(inside, (scale * g - hat * along - through) * rstd, 0.0)
        of_stream += own
        of_scale += g * hat + own * (shift * nu)
        of_shift += g
    return of_stream, of_scale, of_shift


@triton.jit
def perturbed_statistics(
    z_row, g_row, stride_sample, weight, row, key, shift, mu, norm, SAMPLES: tl.constexpr, SLOTS: tl.constexpr,
    GROUPS: tl.constexpr, TILES: tl.constexpr, CENTRED: tl.constexpr, OFFSET: tl.constexpr, GAUSSIAN: tl.constexpr
):  # fmt: skip
    """What the gradients need of the whole row, of every sample: (1/σ', μ', mean(h ẑ'), mean(h)), and Σ pull.

    Each of the four is (SLOTS,). h = γ ⊙ g; pull = ⟨γ ⊙ ν, ∂z'⟩ is the gradient in shift. All sums of a sample are of
    one pass, and of deviations from μ, the mean of z, from which that of z' differs so little that no digits cancel.
    """
    width, eps = norm
    slot = tl.arange(0, SLOTS)
    rstds = tl.zeros((SLOTS,), tl.float32)
    means = tl.zeros((SLOTS,), tl.float32)
    alongs = tl.zeros((SLOTS,), tl.float32)
    throughs = tl.zeros((SLOTS,), tl.float32)
    pull = 0.0
    for sample in range(SAMPLES):
        moved, squares, through, along, push, push_moved, push_through = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for tile in range(TILES):
            z, nu, scale, channel, inside = perturbed(
                tile, z_row, weight, row, sample, key, shift, width, GROUPS, OFFSET, GAUSSIAN
            )
            direction = scale * nu
            h = scale * load(g_row + sample * stride_sample, channel, inside)
            if CENTRED:
                z = tl.where(inside, z - mu, 0.0)
                moved += tl.sum(z)
                through += tl.sum(h)
                push += tl.sum(direction)
            squares += tl.sum(z * z)
            along += tl.sum(h * z)
            push_moved += tl.sum(direction * z)
            push_through += tl.sum(direction * h)
        mean = moved / width
        rstd = tl.rsqrt(squares / width - mean * mean + eps)
        along = (along - mean * through) * rstd / width
        through = through / width
        pull += rstd * (push_through - along * rstd * (push_moved - mean * push) - through * push)
        rstds = tl.where(slot == sample, rstd, rstds)
        means = tl.where(slot == sample, mu + mean, means)
        alongs = tl.where(slot == sample, along, alongs)
        throughs = tl.where(slot == sample, through, throughs)
    return (rstds, means, alongs, throughs), pull
