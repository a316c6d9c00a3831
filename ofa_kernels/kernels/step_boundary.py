"""Everything between two branches in one sweep: the end of one measured step and the beginning of the next."""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.perturb import add_rows, perturbed, perturbed_gradient
from ofa_kernels.kernels.philox import probe_tile
from ofa_kernels.kernels.tile import channels, load, load_scale, normalize, normalize_gradient, store


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
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """The end of `step` and the beginning of `step` + 1; one program per row.

        update_sqnorm = ‖update‖²,   products[i] = ν_iᵀ(copies[i] − update)          ν of step
        stream = residual + update
        stack[0] = N(stream),   stack[1 + i] = N(stream + ε γ/σ ⊙ ν_i)               ν of step + 1

    copies is (COPIES, rows, width), stack (1 + SAMPLES, rows, width), products (COPIES, rows) float32.
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    eps, epsilon = tl.cast(eps, tl.float32), tl.cast(epsilon, tl.float32)
    channel = channels(0, GROUPS)
    inside = channel < width
    u = load(update + row * stride_update, channel, inside)
    z = (load(residual + row * stride_residual, channel, inside) + u).to(stream.dtype.element_ty)
    tl.store(stream + row * width + channel, z, mask=inside)
    z = z.to(tl.float32)
    tl.store(update_sqnorm + row, tl.sum(u * u))
    for copy in range(COPIES):
        nu = probe_tile(0, row, copy, step, seed_low, seed_high, GROUPS, GAUSSIAN)
        change = load(copies + copy * stride_sample + row * stride_copy, channel, inside) - u
        tl.store(products + copy * rows + row, tl.sum(nu * change))
    scale = load_scale(weight, channel, inside, OFFSET)
    hat, r = normalize(z, inside, width, eps, CENTRED)
    _store_scaled(stack + row * width, hat * scale, bias, channel, inside)
    for sample in range(SAMPLES):
        nu = probe_tile(0, row, sample, step + 1, seed_low, seed_high, GROUPS, GAUSSIAN)
        moved = perturbed(z, scale, epsilon * r, nu, inside, width, eps, CENTRED)[0]
        _store_scaled(stack + ((1 + sample) * rows + row) * width, moved * scale, bias, channel, inside)


@triton.jit
def _store_scaled(pointer, y, bias, channel, inside):
    if bias is not None:
        y += load(bias, channel, inside)
    store(pointer, channel, inside, y)


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
    GROUPS: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    IN_MEMORY: tl.constexpr,
):
    """Gradients of residual, update, copies, γ and β; each program takes a run of rows.

        ∂residual = grad_stream + what comes back through the norms of `grad_stack`
        ∂update = ∂residual + 2 grad_sqnorm · update − Σ_i ν_i grad_products[i],   ∂copies[i] = ν_i grad_products[i]

    Every incoming gradient may be None and all are dense, as are stream and update; grad_update is None where it is
    the same as grad_residual. Partial sums are those of `perturb_backward`.
    """
    program = tl.program_id(0).to(tl.int64)
    eps, epsilon = tl.cast(eps, tl.float32), tl.cast(epsilon, tl.float32)
    share = tl.cdiv(rows, tl.num_programs(0))
    size = rows.to(tl.int64) * width
    channel = channels(0, GROUPS)
    inside = channel < width
    weight_sum = tl.zeros((GROUPS, 32), tl.float32)
    bias_sum = tl.zeros((GROUPS, 32), tl.float32)
    for row in range(program * share, tl.minimum((program + 1) * share, rows)):
        at = row * width
        grad = tl.zeros((GROUPS, 32), tl.float32)
        if grad_stack is not None:
            z = load(stream + at, channel, inside)
            scale = load_scale(weight, channel, inside, OFFSET)
            r = normalize(z, inside, width, eps, CENTRED)[1]
            pull = 0.0
            for sample in range(SAMPLES):
                nu = probe_tile(0, row, sample, step + 1, seed_low, seed_high, GROUPS, GAUSSIAN)
                g = load(grad_stack + (1 + sample) * size + at, channel, inside)
                own, of_scale, of_shift = perturbed_gradient(g, z, scale, epsilon * r, nu, inside, width, eps, CENTRED)
                grad += own
                pull += of_shift
                weight_sum = add_rows(partial_weight, program, weight_sum, of_scale, channel, inside, width, IN_MEMORY)
                if partial_bias is not None:
                    bias_sum = add_rows(partial_bias, program, bias_sum, g, channel, inside, width, IN_MEMORY)
            hat, r = normalize(z, inside, width, eps, CENTRED)
            g = load(grad_stack + at, channel, inside)
            weight_sum = add_rows(partial_weight, program, weight_sum, g * hat, channel, inside, width, IN_MEMORY)
            if partial_bias is not None:
                bias_sum = add_rows(partial_bias, program, bias_sum, g, channel, inside, width, IN_MEMORY)
            grad += normalize_gradient(g * scale, hat, inside, r, width, CENTRED)
            grad -= hat * (epsilon * pull * r * r / width)
        if grad_stream is not None:
            grad += load(grad_stream + at, channel, inside)
        store(grad_residual + at, channel, inside, grad)
        if grad_sqnorm is not None:
            grad += 2.0 * tl.load(grad_sqnorm + row) * load(update + at, channel, inside)
        if grad_products is not None:
            for copy in range(COPIES):
                nu = probe_tile(0, row, copy, step, seed_low, seed_high, GROUPS, GAUSSIAN)
                own = nu * tl.load(grad_products + copy * rows + row)
                grad -= own
                store(grad_copies + copy * size + at, channel, inside, own)
        if grad_update is not None:
            store(grad_update + at, channel, inside, grad)
    if grad_stack is not None and not IN_MEMORY:
        store(partial_weight + program * width, channel, inside, weight_sum)
        if partial_bias is not None:
            store(partial_bias + program * width, channel, inside, bias_sum)
