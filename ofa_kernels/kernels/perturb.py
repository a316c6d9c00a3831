"""Normalized copies of a row, each moved along one preconditioned probe: one read, all copies written."""

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


@triton.jit
def perturbed_tile(
    tile,
    z_row,
    weight,
    row,
    sample,
    step,
    seed_low,
    seed_high,
    shift,
    width,
    GROUPS: tl.constexpr,
    OFFSET: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """(z', γ ⊙ ν, γ) of one tile, z' = z + shift·γ ⊙ ν; and its channels and which of them exist."""
    channel = channels(tile, GROUPS)
    inside = channel < width
    scale = load_scale(weight, channel, inside, OFFSET)
    # Not (shift·γ)·ν: the compiler would keep shift·γ in registers from sample to sample.
    nu = probe_tile(tile, row, sample, step, seed_low, seed_high, GROUPS, GAUSSIAN)
    return load(z_row, channel, inside) + scale * (shift * nu), scale * nu, scale, channel, inside


@triton.jit
def perturbed_sums(
    z_row,
    g_row,
    weight,
    row,
    sample,
    step,
    seed_low,
    seed_high,
    shift,
    mu,
    width,
    eps,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """What the gradient of ⟨g, γ ⊙ ẑ'⟩ needs of the whole row, in one pass: (1/σ', μ', mean(h ẑ'), mean(h), pull).

    h = γ ⊙ g, and pull = ⟨γ ⊙ ν, ∂z'⟩ is the gradient in shift. Sums are of deviations from μ, the mean of z, from
    which that of z' differs so little that no digits cancel.
    """
    moved, squares, through, along, push, push_moved, push_through = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for tile in range(TILES):
        z, direction, scale, channel, inside = perturbed_tile(
            tile, z_row, weight, row, sample, step, seed_low, seed_high, shift, width, GROUPS, OFFSET, GAUSSIAN
        )
        h = scale * load(g_row, channel, inside)
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
    pull = rstd * (push_through - along * rstd * (push_moved - mean * push) - through * push)
    return rstd, mu + mean, along, through, pull


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
    out = copies + row * width
    if undisturbed is not None:
        for tile in range(TILES):
            channel = channels(tile, GROUPS)
            inside = channel < width
            store(out, channel, inside, load(undisturbed + row * stride_undisturbed, channel, inside))
        out += rows * width
    z_row = stream + row * stride_stream
    _, r = row_moments(z_row, width, eps, GROUPS, TILES, CENTRED)
    for sample in range(SAMPLES):
        store_perturbed(
            out + sample * rows * width,
            z_row,
            weight,
            bias,
            row,
            sample,
            step,
            seed_low,
            seed_high,
            epsilon * r,
            width,
            eps,
            GROUPS,
            TILES,
            CENTRED,
            OFFSET,
            GAUSSIAN,
        )


@triton.jit
def store_perturbed(
    out,
    z_row,
    weight,
    bias,
    row,
    sample,
    step,
    seed_low,
    seed_high,
    shift,
    width,
    eps,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """Write γ ⊙ ẑ' + β for z' = z + shift·γ ⊙ ν."""
    mean, squares = 0.0, 0.0
    for tile in range(TILES):
        z, _, scale, channel, inside = perturbed_tile(
            tile, z_row, weight, row, sample, step, seed_low, seed_high, shift, width, GROUPS, OFFSET, GAUSSIAN
        )
        mean, squares = merge_moments(z, inside, tile, mean, squares, width, GROUPS, CENTRED)
    r = tl.rsqrt(squares / width + eps)
    for tile in range(TILES):
        z, _, scale, channel, inside = perturbed_tile(
            tile,
            z_row,
            weight,
            row,
            sample,
            step,
            seed_low,
            seed_high,
            shift,
            width,
            GROUPS,
            OFFSET,
            GAUSSIAN,
        )
        y = (z - mean) * r * scale
        if bias is not None:
            y += load(bias, channel, inside)
        store(out, channel, inside, y)


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
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """Gradients of z, γ and β; each program takes a run of rows and computes the same probes again.

    partial_weight and partial_bias (or None) are those of `norm_step_backward`.
    """
    program = tl.program_id(0).to(tl.int64)
    eps, epsilon = tl.cast(eps, tl.float32), tl.cast(epsilon, tl.float32)
    share = tl.cdiv(rows, tl.num_programs(0))
    weight_sum = tl.zeros((GROUPS, 32), tl.float32)
    bias_sum = tl.zeros((GROUPS, 32), tl.float32)
    for row in range(program * share, tl.minimum((program + 1) * share, rows)):
        z_row = stream + row * stride_stream
        mu, r = row_moments(z_row, width, eps, GROUPS, TILES, CENTRED)
        for tile in range(TILES):
            channel = channels(tile, GROUPS)
            inside = channel < width
            grad = tl.zeros((GROUPS, 32), tl.float32)
            pull = 0.0
            if TILES > 1:
                weight_sum = tl.zeros((GROUPS, 32), tl.float32)
                bias_sum = tl.zeros((GROUPS, 32), tl.float32)
            for sample in range(SAMPLES):
                g_row = grad_copies + sample * stride_sample + row * stride_row
                own, of_scale, g, of_shift = perturbed_gradient(
                    tile,
                    z_row,
                    g_row,
                    weight,
                    row,
                    sample,
                    step,
                    seed_low,
                    seed_high,
                    epsilon * r,
                    mu,
                    width,
                    eps,
                    GROUPS,
                    TILES,
                    CENTRED,
                    OFFSET,
                    GAUSSIAN,
                )
                grad += own
                pull += of_shift
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
    tile,
    z_row,
    g_row,
    weight,
    row,
    sample,
    step,
    seed_low,
    seed_high,
    shift,
    mu,
    width,
    eps,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """Gradients of ⟨g, γ ⊙ ẑ'⟩ in z' and in γ (through the scale and through the move), of one tile; g; and pull."""
    rstd, mean, along, through, pull = perturbed_sums(
        z_row,
        g_row,
        weight,
        row,
        sample,
        step,
        seed_low,
        seed_high,
        shift,
        mu,
        width,
        eps,
        GROUPS,
        TILES,
        CENTRED,
        OFFSET,
        GAUSSIAN,
    )
    z, _, scale, channel, inside = perturbed_tile(
        tile, z_row, weight, row, sample, step, seed_low, seed_high, shift, width, GROUPS, OFFSET, GAUSSIAN
    )
    nu = probe_tile(tile, row, sample, step, seed_low, seed_high, GROUPS, GAUSSIAN)
    g = load_again(g_row, channel, inside)
    hat = (z - mean) * rstd
    grad = tl.where(inside, (scale * g - hat * along - through) * rstd, 0.0)
    return grad, g * hat + grad * (shift * nu), g, pull
