"""All row operations between two branches in one sweep: the end of a measured step and the start of the next."""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.perturb import perturbed_gradient, perturbed_statistics, squared_scale, store_perturbed
from ofa_kernels.kernels.philox import times_probe
from ofa_kernels.kernels.tile import (
    add_in_memory,
    channels,
    load,
    load_again,
    load_scale,
    merge_moments_and_sum,
    row_moments,
    store,
    sum_two,
)


@triton.jit(do_not_specialize=["step", "seed_low", "seed_high"])
def step_boundary_forward(
    residual,
    update,
    copies,
    weight,
    bias,
    stream,
    stack,
    update_sqnorm,
    products,
    width,
    stride_residual,
    stride_update,
    stride_sample,
    stride_copy,
    eps,
    epsilon,
    step,
    seed_low,
    seed_high,
    COPIES: tl.constexpr,
    SAMPLES: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """The end of `step` and the start of `step` + 1; one program per row.

        update_sqnorm = ‖update‖²,   products[i] = ν_iᵀ(copies[i] − update)          ν of step
        stream = residual + update
        stack[0] = N(stream),   stack[1 + i] = N(stream + ε γ/σ ⊙ ν_i)               ν of step + 1

    copies is (COPIES, rows, width), stack (1 + SAMPLES, rows, width), products (COPIES, rows) float32.
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    eps, epsilon = tl.cast(eps, tl.float32), tl.cast(epsilon, tl.float32)
    key = (step, seed_low, seed_high)
    stride_sample = tl.cast(stride_sample, tl.int64)
    z_row = stream + row * width
    length, mu, squares = 0.0, 0.0, 0.0
    for tile in tl.static_range(TILES):
        channel = channels(tile, GROUPS)
        inside = channel < width
        u = load(update + row * stride_update, channel, inside)
        z = (load(residual + row * stride_residual, channel, inside) + u).to(stream.dtype.element_ty)
        tl.store(z_row + channel, z, mask=inside)
        z = z.to(tl.float32)
        mu, squares, more = merge_moments_and_sum(z, u * u, inside, tile, mu, squares, width, GROUPS, CENTRED)
        length += more
    tl.store(update_sqnorm + row, length)
    # The threads that read the stream again may not be those that wrote it.
    tl.debug_barrier()
    r = tl.rsqrt(squares / width + eps)
    for copy in range(COPIES):
        product = 0.0
        for tile in tl.static_range(TILES):
            channel = channels(tile, GROUPS)
            inside = channel < width
            u = load_again(update + row * stride_update, channel, inside)
            change = load(copies + copy * stride_sample + row * stride_copy, channel, inside) - u
            product += tl.sum(times_probe(change, tile, row, copy, key, GROUPS, GAUSSIAN))
        tl.store(products + copy * rows + row, product)
    for tile in tl.static_range(TILES):
        channel = channels(tile, GROUPS)
        inside = channel < width
        if TILES > 1:
            z = load(z_row, channel, inside)
        y = (z - mu) * r * load_scale(weight, channel, inside, OFFSET)
        if bias is not None:
            y += load(bias, channel, inside)
        store(stack + row * width, channel, inside, y)
    next_key, norm, shift = (step + 1, seed_low, seed_high), (width, eps), epsilon * r
    for sample in range(SAMPLES):
        into = stack + ((1 + sample) * rows + row) * width
        store_perturbed(
            into, z_row, weight, bias, row, sample, next_key, shift, mu, norm, GROUPS, TILES, CENTRED, OFFSET, GAUSSIAN
        )


@triton.jit(do_not_specialize=["rows", "step", "seed_low", "seed_high"])
def step_boundary_backward(
    stream,
    update,
    weight,
    grad_stream,
    grad_stack,
    grad_sqnorm,
    grad_products,
    grad_residual,
    grad_update,
    grad_copies,
    partial_weight,
    partial_bias,
    rows,
    width,
    eps,
    epsilon,
    step,
    seed_low,
    seed_high,
    COPIES: tl.constexpr,
    SAMPLES: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """Gradients of residual, update, copies, γ and β; each program takes a run of rows.

        ∂residual = grad_stream + gradient of `grad_stack` through the norms
        ∂update = ∂residual + 2 grad_sqnorm · update − Σ_i ν_i grad_products[i],   ∂copies[i] = ν_i grad_products[i]

    Every incoming gradient may be None. All tensors are dense. grad_update is None if it equals grad_residual. Partial
    sums are as in `perturb_backward`.
    """
    program = tl.program_id(0).to(tl.int64)
    eps, epsilon = tl.cast(eps, tl.float32), tl.cast(epsilon, tl.float32)
    key, next_key, norm = (step, seed_low, seed_high), (step + 1, seed_low, seed_high), (width, eps)
    share = tl.cdiv(rows, tl.num_programs(0))
    size = rows.to(tl.int64) * width
    weight_sum = tl.zeros((GROUPS, 32), tl.float32)
    bias_sum = tl.zeros((GROUPS, 32), tl.float32)
    if grad_stack is not None:
        scale_squares = squared_scale(weight, width, GROUPS, TILES, OFFSET)
    for row in range(program * share, tl.minimum((program + 1) * share, rows)):
        at = row * width
        z_row, g_row = stream + at, grad_stack
        if grad_stack is not None:
            g_row = grad_stack + at
            mu, r = row_moments(z_row, width, eps, GROUPS, TILES, CENTRED)
            shift = epsilon * r
            along, through = unperturbed_statistics(z_row, g_row, weight, mu, r, width, GROUPS, TILES, CENTRED, OFFSET)
            statistics, pull = perturbed_statistics(
                z_row, g_row + size, size, weight, scale_squares, row, next_key, shift, mu, r, norm, SAMPLES, SLOTS,
                GROUPS, TILES, STAGES, CENTRED, OFFSET, GAUSSIAN
            )  # fmt: skip
            # shift = ε/σ, and ∂(1/σ)/∂z = −ẑ/(σ² d) is along ẑ as well.
            along += epsilon * pull * r / width
        for tile in range(TILES):
            channel = channels(tile, GROUPS)
            inside = channel < width
            grad = tl.zeros((GROUPS, 32), tl.float32)
            if grad_stack is not None:
                if TILES > 1:
                    weight_sum = tl.zeros((GROUPS, 32), tl.float32)
                    bias_sum = tl.zeros((GROUPS, 32), tl.float32)
                grad, of_scale, of_shift = perturbed_gradient(
                    tile, z_row, g_row + size, size, weight, row, next_key, shift, mu, width, statistics, SAMPLES,
                    SLOTS, GROUPS, CENTRED, OFFSET, GAUSSIAN
                )  # fmt: skip
                g = load_again(g_row, channel, inside)
                hat = (load(z_row, channel, inside) - mu) * r
                weight_sum += of_scale + g * hat
                bias_sum += of_shift + g
                if TILES > 1:
                    add_in_memory(partial_weight + program * width, channel, inside, weight_sum)
                    if partial_bias is not None:
                        add_in_memory(partial_bias + program * width, channel, inside, bias_sum)
                grad += (g * load_scale(weight, channel, inside, OFFSET) - hat * along - through) * r
            if grad_stream is not None:
                grad += load(grad_stream + at, channel, inside)
            store(grad_residual + at, channel, inside, grad)
            if grad_sqnorm is not None:
                grad += 2.0 * tl.load(grad_sqnorm + row) * load(update + at, channel, inside)
            if grad_products is not None:
                for copy in range(COPIES):
                    own = tl.load(grad_products + copy * rows + row)
                    own = times_probe(own, tile, row, copy, key, GROUPS, GAUSSIAN)
                    grad -= own
                    store(grad_copies + copy * size + at, channel, inside, own)
            if grad_update is not None:
                store(grad_update + at, channel, inside, grad)
    if TILES == 1 and grad_stack is not None:
        channel = channels(0, GROUPS)
        store(partial_weight + program * width, channel, channel < width, weight_sum)
        if partial_bias is not None:
            store(partial_bias + program * width, channel, channel < width, bias_sum)


@triton.jit
def unperturbed_statistics(
    z_row, g_row, weight, mu, r, width, GROUPS: tl.constexpr, TILES: tl.constexpr, CENTRED: tl.constexpr,
    OFFSET: tl.constexpr
):  # fmt: skip
    """mean(h ẑ) and mean(h) of a row, h = γ ⊙ g, the second 0 unless CENTRED."""
    along, through = 0.0, 0.0
    for tile in range(TILES):
        channel = channels(tile, GROUPS)
        inside = channel < width
        h = load(g_row, channel, inside) * load_scale(weight, channel, inside, OFFSET)
        product = h * (load(z_row, channel, inside) - mu)
        if CENTRED:
            more, total = sum_two(product, h)
            through += total / width
        else:
            more = tl.sum(product)
        along += more * r / width
    return along, through
