"""Normalized copies of a row, each moved along one preconditioned probe, from one read of the stream."""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.philox import times_probe
from ofa_kernels.kernels.tile import (
    add_in_memory,
    channels,
    load,
    load_again,
    load_scale,
    row_moments,
    store,
    sum_four,
    sum_three,
    sum_two,
)


@triton.jit(do_not_specialize=["step", "seed_low", "seed_high"])
def perturb_forward(
    stream,
    unperturbed,
    weight,
    bias,
    copies,
    width,
    stride_stream,
    stride_unperturbed,
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
    SCALED: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """copies[i] = N(z + ε γ/σ ⊙ ν_i), (SAMPLES, rows, width), or N(z + ε/σ ν_i) unless SCALED; one program per row.

    z is read once. With `unperturbed`, (rows, width), the output begins with a copy of it: (1 + SAMPLES, rows, width).
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    eps, epsilon = tl.cast(eps, tl.float32), tl.cast(epsilon, tl.float32)
    key, norm = (step, seed_low, seed_high), (width, eps)
    out = copies + row * width
    if unperturbed is not None:
        for tile in range(TILES):
            channel = channels(tile, GROUPS)
            inside = channel < width
            store(out, channel, inside, load(unperturbed + row * stride_unperturbed, channel, inside))
        out += rows * width
    z_row = stream + row * stride_stream
    mu, r = row_moments(z_row, width, eps, GROUPS, TILES, CENTRED)
    shift = epsilon * r
    for sample in range(SAMPLES):
        into = out + sample * rows * width
        store_perturbed(
            into, z_row, weight, bias, row, sample, key, shift, mu, norm, GROUPS, TILES, CENTRED, OFFSET, SCALED,
            GAUSSIAN
        )  # fmt: skip


@triton.jit
def store_perturbed(
    out, z_row, weight, bias, row, sample, key, shift, mu, norm, GROUPS: tl.constexpr, TILES: tl.constexpr,
    CENTRED: tl.constexpr, OFFSET: tl.constexpr, SCALED: tl.constexpr, GAUSSIAN: tl.constexpr
):  # fmt: skip
    """Write γ ⊙ ẑ' + β for z' = z + shift·γ ⊙ ν, or z + shift·ν unless SCALED.

    Sums are of deviations from μ, the mean of z: the mean of z' is so close to it that nothing cancels.
    """
    width, eps = norm
    moved, squares = 0.0, 0.0
    for tile in range(TILES):
        z, _, inside = perturbed(
            tile, z_row, weight, row, sample, key, shift, mu, width, GROUPS, OFFSET, SCALED, GAUSSIAN
        )
        if CENTRED:
            z = tl.where(inside, z, 0.0)
            more, more_squares = sum_two(z, z * z)
            moved += more
        else:
            more_squares = tl.sum(z * z)
        squares += more_squares
    mean = moved / width
    r = tl.rsqrt(squares / width - mean * mean + eps)
    for tile in range(TILES):
        z, scale, inside = perturbed(
            tile, z_row, weight, row, sample, key, shift, mu, width, GROUPS, OFFSET, SCALED, GAUSSIAN
        )
        channel = channels(tile, GROUPS)
        y = (z - mean) * r * scale
        if bias is not None:
            y += load(bias, channel, inside)
        store(out, channel, inside, y)


@triton.jit
def perturbed(
    tile, z_row, weight, row, sample, key, shift, mu, width, GROUPS: tl.constexpr, OFFSET: tl.constexpr,
    SCALED: tl.constexpr, GAUSSIAN: tl.constexpr
):  # fmt: skip
    """One tile of z' − μ (as in `store_perturbed`), of γ, and of the mask of channels inside the row."""
    channel = channels(tile, GROUPS)
    inside = channel < width
    scale = load_scale(weight, channel, inside, OFFSET)
    # Not (shift·γ) ⊙ ν: the compiler would keep shift·γ in registers across samples.
    move = times_probe(shift, tile, row, sample, key, GROUPS, GAUSSIAN)
    move = move * scale if SCALED else tl.where(inside, move, 0.0)
    return load(z_row, channel, inside) - mu + move, scale, inside


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
    STAGES: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """Gradients of z, γ and β; each program takes a run of rows and recomputes the probes.

    SLOTS is the power of two that holds SAMPLES. partial_weight and partial_bias (or None) are as in
    `norm_step_backward`.
    """
    program = tl.program_id(0).to(tl.int64)
    eps, epsilon = tl.cast(eps, tl.float32), tl.cast(epsilon, tl.float32)
    key, norm = (step, seed_low, seed_high), (width, eps)
    stride_sample = tl.cast(stride_sample, tl.int64)
    share = tl.cdiv(rows, tl.num_programs(0))
    weight_sum = tl.zeros((GROUPS, 32), tl.float32)
    bias_sum = tl.zeros((GROUPS, 32), tl.float32)
    scale_squares = squared_scale(weight, width, GROUPS, TILES, OFFSET)
    for row in range(program * share, tl.minimum((program + 1) * share, rows)):
        z_row, g_row = stream + row * stride_stream, grad_copies + row * stride_row
        mu, r = row_moments(z_row, width, eps, GROUPS, TILES, CENTRED)
        shift = epsilon * r
        statistics, pull = perturbed_statistics(
            z_row, g_row, stride_sample, weight, scale_squares, row, key, shift, mu, r, norm, SAMPLES, SLOTS, GROUPS,
            TILES, STAGES, CENTRED, OFFSET, GAUSSIAN
        )  # fmt: skip
        for tile in range(TILES):
            channel = channels(tile, GROUPS)
            inside = channel < width
            if TILES > 1:
                weight_sum = tl.zeros((GROUPS, 32), tl.float32)
                bias_sum = tl.zeros((GROUPS, 32), tl.float32)
            grad, of_scale, g = perturbed_gradient(
                tile, z_row, g_row, stride_sample, weight, row, key, shift, mu, width, statistics, SAMPLES, SLOTS,
                GROUPS, CENTRED, OFFSET, GAUSSIAN
            )  # fmt: skip
            weight_sum += of_scale
            bias_sum += g
            if TILES > 1:
                add_in_memory(partial_weight + program * width, channel, inside, weight_sum)
                if partial_bias is not None:
                    add_in_memory(partial_bias + program * width, channel, inside, bias_sum)
            # shift = ε/σ and ∂(1/σ)/∂z = −ẑ/(σ² d).
            hat = (load(z_row, channel, inside) - mu) * r
            store(grad_stream + row * width, channel, inside, grad - hat * (epsilon * pull * r * r / width))
    if TILES == 1:
        channel = channels(0, GROUPS)
        store(partial_weight + program * width, channel, channel < width, weight_sum)
        if partial_bias is not None:
            store(partial_bias + program * width, channel, channel < width, bias_sum)


@triton.jit
def squared_scale(weight, width, GROUPS: tl.constexpr, TILES: tl.constexpr, OFFSET: tl.constexpr):
    """‖γ‖², equal to ‖γ ⊙ ν‖² for every Rademacher probe ν."""
    squares = 0.0
    for tile in range(TILES):
        channel = channels(tile, GROUPS)
        scale = load_scale(weight, channel, channel < width, OFFSET)
        squares += tl.sum(scale * scale)
    return squares


@triton.jit
def perturbed_statistics(
    z_row, g_row, stride_sample, weight, scale_squares, row, key, shift, mu, r, norm, SAMPLES: tl.constexpr,
    SLOTS: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, CENTRED: tl.constexpr,
    OFFSET: tl.constexpr, GAUSSIAN: tl.constexpr
):  # fmt: skip
    """Sums over the row that the gradients need: (1/σ', a, δ, t, (SLOTS,) each; Σ a/σ'² over the samples), and Σ pull.

    With p = γ ⊙ ν, c = z − μ and h = γ ⊙ g, z' − μ = c + shift·p. So ⟨p, c⟩, ⟨p, h⟩, ⟨h, c⟩, ‖p‖², Σ p and Σ h give
    δ = mean(z') − μ, 1/σ', a = mean(h ẑ'), t = mean(h), and pull = ⟨p, ∂z'⟩, the gradient in shift.
    Sums are of deviations from μ: the mean of z' is so close to it that nothing cancels.
    """
    width, eps = norm
    slot = tl.arange(0, SLOTS)
    rstds = tl.zeros((SLOTS,), tl.float32)
    alongs = tl.zeros((SLOTS,), tl.float32)
    gaps = tl.zeros((SLOTS,), tl.float32)
    throughs = tl.zeros((SLOTS,), tl.float32)
    all_along, pull = 0.0, 0.0
    for sample in tl.range(SAMPLES, num_stages=STAGES):
        push_push, push_z, push_h, along, push, through = probe_products(
            z_row, g_row + sample * stride_sample, weight, scale_squares, row, sample, key, mu, width, GROUPS, TILES,
            CENTRED, OFFSET, GAUSSIAN
        )  # fmt: skip
        gap = shift * push / width
        variance = 1.0 / (r * r) + shift * (2.0 * push_z + shift * push_push) / width - gap * gap
        # Rounding may make the variance of a row of one column negative.
        rstd = tl.rsqrt(tl.maximum(variance, eps))
        along = (along + shift * push_h - gap * through) * rstd / width
        through = through / width
        push_moved = push_z + shift * push_push - gap * push
        pull += rstd * (push_h - along * rstd * push_moved - through * push)
        all_along += along * rstd * rstd
        here = slot == sample
        rstds = tl.where(here, rstd, rstds)
        alongs = tl.where(here, along, alongs)
        gaps = tl.where(here, gap, gaps)
        throughs = tl.where(here, through, throughs)
    return (rstds, alongs, gaps, throughs, all_along), pull


@triton.jit
def probe_products(
    z_row, g_row, weight, scale_squares, row, sample, key, mu, width, GROUPS: tl.constexpr, TILES: tl.constexpr,
    CENTRED: tl.constexpr, OFFSET: tl.constexpr, GAUSSIAN: tl.constexpr
):  # fmt: skip
    """‖p‖², ⟨p, c⟩, ⟨p, h⟩, ⟨h, c⟩, Σ p and Σ h of one sample's row; the last two are 0 unless CENTRED."""
    push_push, push_z, push_h, along, push, through = scale_squares, 0.0, 0.0, 0.0, 0.0, 0.0
    if GAUSSIAN:
        push_push = 0.0
    for tile in range(TILES):
        channel = channels(tile, GROUPS)
        inside = channel < width
        scale = load_scale(weight, channel, inside, OFFSET)
        z = load(z_row, channel, inside)
        if CENTRED:
            z = tl.where(inside, z - mu, 0.0)
        direction = times_probe(scale, tile, row, sample, key, GROUPS, GAUSSIAN)
        if CENTRED:
            push += tl.sum(direction)
        h = scale * load(g_row, channel, inside)
        if CENTRED:
            of_z, of_h, of_along, of_through = sum_four(direction * z, direction * h, h * z, h)
            through += of_through
        else:
            of_z, of_h, of_along = sum_three(direction * z, direction * h, h * z)
        push_z += of_z
        push_h += of_h
        along += of_along
        if GAUSSIAN:
            push_push += tl.sum(direction * direction)
    return push_push, push_z, push_h, along, push, through


@triton.jit
def perturbed_gradient(
    tile, z_row, g_row, stride_sample, weight, row, key, shift, mu, width, statistics, SAMPLES: tl.constexpr,
    SLOTS: tl.constexpr, GROUPS: tl.constexpr, CENTRED: tl.constexpr, OFFSET: tl.constexpr, GAUSSIAN: tl.constexpr
):  # fmt: skip
    """Σ over the samples, for one tile, of the gradients of ⟨g, γ ⊙ ẑ'⟩: in z', in γ (through scale and move), in β.

    With c = z − μ, ẑ' = (c + shift·γ ⊙ ν − δ)/σ'. Unless CENTRED the product is expanded: multiples of g, ν ⊙ g and ν
    are summed over the samples and multiplied by γ and c once, two thirds of the arithmetic. With a mean the expanded
    terms may cancel, as in a row of one column.
    """
    rstds, alongs, gaps, throughs, all_along = statistics
    channel = channels(tile, GROUPS)
    inside = channel < width
    scale = load_scale(weight, channel, inside, OFFSET)
    z = load(z_row, channel, inside) - mu
    of_stream = tl.zeros((GROUPS, 32), tl.float32)
    of_scale = tl.zeros((GROUPS, 32), tl.float32)
    of_shift = tl.zeros((GROUPS, 32), tl.float32)
    squared = tl.zeros((GROUPS, 32), tl.float32)
    for sample in range(SAMPLES):
        here = tl.arange(0, SLOTS) == sample
        rstd, along = tl.sum(tl.where(here, rstds, 0.0)), tl.sum(tl.where(here, alongs, 0.0))
        turn = times_probe(shift if CENTRED else rstd, tile, row, sample, key, GROUPS, GAUSSIAN)
        g = load_again(g_row + sample * stride_sample, channel, inside)
        of_shift += g
        if CENTRED:
            gap, through = tl.sum(tl.where(here, gaps, 0.0)), tl.sum(tl.where(here, throughs, 0.0))
            hat = (z + scale * turn - gap) * rstd
            own = (scale * g - hat * along - through) * rstd
            of_stream += own
            of_scale += g * hat + own * turn
        else:
            of_stream += g * rstd
            of_stream -= turn * (shift * rstd * along)
            of_scale += g * turn
            if GAUSSIAN:
                squared += turn * turn * along
    if not CENTRED:
        of_move = shift * (2.0 * of_scale - shift * (squared if GAUSSIAN else all_along))
        of_scale = z * of_stream + scale * of_move
        of_stream = scale * of_stream - z * all_along
    return of_stream, of_scale, of_shift
