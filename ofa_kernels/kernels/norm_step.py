"""Residual addition, norm and squared update of every row: one sweep forward, one sweep backward."""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.tile import (
    add_in_memory,
    channels,
    load,
    load_scale,
    merge_moments,
    merge_moments_and_sum,
    store,
    sum_two,
)


@triton.jit
def norm_step_forward(
    residual,
    update,
    weight,
    bias,
    stream,
    normalized,
    update_sqnorm,
    rstd,
    mean,
    width,
    stride_residual,
    stride_update,
    eps,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Z = residual + update, normalized = γ ⊙ (z − μ)/σ + β, update_sqnorm = ‖update‖²; one program per row.

    residual, update (or None) and the outputs stream (or None, with update) and normalized are (rows, width);
    update_sqnorm (or None), rstd = 1/σ and mean = μ (or None, unless CENTRED) are (rows,) float32. The sum is rounded
    to the stream's dtype before it is normalized. A row of several tiles is read a second time for the output.
    """
    row = tl.program_id(0).to(tl.int64)
    eps = tl.cast(eps, tl.float32)
    mu, squares, length = 0.0, 0.0, 0.0
    for tile in tl.static_range(TILES):
        channel = channels(tile, GROUPS)
        inside = channel < width
        z = load(residual + row * stride_residual, channel, inside)
        if update is not None:
            u = load(update + row * stride_update, channel, inside)
            z = (z + u).to(stream.dtype.element_ty)
            tl.store(stream + row * width + channel, z, mask=inside)
            z = z.to(tl.float32)
            mu, squares, more = merge_moments_and_sum(z, u * u, inside, tile, mu, squares, width, GROUPS, CENTRED)
            length += more
        else:
            mu, squares = merge_moments(z, inside, tile, mu, squares, width, GROUPS, CENTRED)
    r = tl.rsqrt(squares / width + eps)
    tl.store(rstd + row, r)
    if CENTRED:
        tl.store(mean + row, mu)
    if update is not None:
        tl.store(update_sqnorm + row, length)
    if TILES > 1 and update is not None:
        # The threads that read the stream again may not be those that wrote it.
        tl.debug_barrier()
    for tile in tl.static_range(TILES):
        if TILES > 1:
            channel = channels(tile, GROUPS)
            inside = channel < width
            if update is not None:
                z = load(stream + row * width, channel, inside)
            else:
                z = load(residual + row * stride_residual, channel, inside)
        y = (z - mu) * r * load_scale(weight, channel, inside, OFFSET)
        if bias is not None:
            y += load(bias, channel, inside)
        store(normalized + row * width, channel, inside, y)


@triton.jit(do_not_specialize=["rows"])
def norm_step_backward(
    stream,
    update,
    weight,
    rstd,
    mean,
    grad_stream,
    grad_normalized,
    grad_sqnorm,
    grad_rstd,
    grad_residual,
    grad_update,
    partial_weight,
    partial_bias,
    rows,
    width,
    stride_stream,
    stride_grad_stream,
    stride_grad_normalized,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Gradients of residual, update, γ and β; each program takes a run of rows.

        ∂residual = grad_stream + (h − ẑ·(mean(h ẑ) + grad_rstd/(σ d)) − mean(h))/σ,   h = γ ⊙ grad_normalized
        ∂update = ∂residual + 2 grad_sqnorm · update,   ∂γ = Σ grad_normalized ⊙ ẑ,   ∂β = Σ grad_normalized

    Every incoming gradient may be None. partial_weight and partial_bias (or None) are (programs, width) float32, the
    sums over a program's own rows in their order; rows of several tiles add in memory and need zeros at the start.
    """
    program = tl.program_id(0).to(tl.int64)
    share = tl.cdiv(rows, tl.num_programs(0))
    weight_sum = tl.zeros((GROUPS, 32), tl.float32)
    bias_sum = tl.zeros((GROUPS, 32), tl.float32)
    if TILES == 1 and STAGES > 1 and grad_normalized is not None:
        # Loaded once: in the loop it would be a third of what every row loads ahead.
        scale = load_scale(weight, channels(0, GROUPS), channels(0, GROUPS) < width, OFFSET)
    for row in tl.range(program * share, tl.minimum((program + 1) * share, rows), num_stages=STAGES):
        r = tl.load(rstd + row)
        mu = 0.0
        if CENTRED:
            mu = tl.load(mean + row)
        along, average, to_update = 0.0, 0.0, 0.0
        if grad_sqnorm is not None:
            to_update = 2.0 * tl.load(grad_sqnorm + row)
        if TILES == 1 and partial_bias is None:
            # Load before the reduction's sync, so that one wait covers all loads; with sums of a shift, registers are
            # too few.
            channel = channels(0, GROUPS)
            inside = channel < width
            if grad_stream is not None:
                passed = load(grad_stream + row * stride_grad_stream, channel, inside)
            if grad_sqnorm is not None:
                u = load(update + row * width, channel, inside)
        if grad_normalized is not None:
            for tile in tl.static_range(TILES):
                channel = channels(tile, GROUPS)
                inside = channel < width
                hat = (load(stream + row * stride_stream, channel, inside) - mu) * r
                if CENTRED:
                    hat = tl.where(inside, hat, 0.0)
                g = load(grad_normalized + row * stride_grad_normalized, channel, inside)
                if TILES > 1 or STAGES == 1:
                    scale = load_scale(weight, channel, inside, OFFSET)
                h = g * scale
                if CENTRED:
                    more, total = sum_two(h * hat, h)
                    average += total / width
                else:
                    more = tl.sum(h * hat)
                along += more / width
        if grad_rstd is not None:
            along += tl.load(grad_rstd + row) * r / width
        for tile in tl.static_range(TILES):
            if TILES > 1 or grad_normalized is None:
                channel = channels(tile, GROUPS)
                inside = channel < width
                hat = (load(stream + row * stride_stream, channel, inside) - mu) * r
            grad = -hat * along * r
            if grad_normalized is not None:
                if TILES > 1:
                    g = load(grad_normalized + row * stride_grad_normalized, channel, inside)
                    h = g * load_scale(weight, channel, inside, OFFSET)
                    add_in_memory(partial_weight + program * width, channel, inside, g * hat)
                    if partial_bias is not None:
                        add_in_memory(partial_bias + program * width, channel, inside, g)
                else:
                    weight_sum += g * hat
                    if partial_bias is not None:
                        bias_sum += g
                grad += (h - average) * r
            if grad_stream is not None:
                if TILES > 1 or partial_bias is not None:
                    passed = load(grad_stream + row * stride_grad_stream, channel, inside)
                grad += passed
            store(grad_residual + row * width, channel, inside, grad)
            if grad_sqnorm is not None:
                if TILES > 1 or partial_bias is not None:
                    u = load(update + row * width, channel, inside)
                store(grad_update + row * width, channel, inside, grad + to_update * u)
    if TILES == 1 and grad_normalized is not None:
        channel = channels(0, GROUPS)
        store(partial_weight + program * width, channel, channel < width, weight_sum)
        if partial_bias is not None:
            store(partial_bias + program * width, channel, channel < width, bias_sum)
