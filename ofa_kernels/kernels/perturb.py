"""Normalized copies of a row, each moved along one preconditioned probe: one read, all copies written."""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.philox import probe_tile
from ofa_kernels.kernels.tile import channels, load, load_scale, normalize, normalize_gradient, store


@triton.jit
def perturbed(z, scale, shift, nu, inside, width, eps, CENTRED: tl.constexpr):
    """(ẑ', 1/σ') of z' = z + shift·γ ⊙ ν: one copy, before its own scale and shift."""
    moved = tl.where(inside, z + shift * scale * nu, 0.0)
    return normalize(moved, inside, width, eps, CENTRED)


@triton.jit
def perturbed_gradient(g, z, scale, shift, nu, inside, width, eps, CENTRED: tl.constexpr):
    """Gradients of ⟨g, γ ⊙ ẑ'⟩: in z', in γ (through the scale and through the move), and in shift."""
    hat, rstd = perturbed(z, scale, shift, nu, inside, width, eps, CENTRED)
    grad = normalize_gradient(g * scale, hat, inside, rstd, width, CENTRED)
    return grad, g * hat + shift * nu * grad, tl.sum(scale * nu * grad)


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
    channel = channels(0, GROUPS)
    inside = channel < width
    out = copies + row * width
    if undisturbed is not None:
        store(out, channel, inside, load(undisturbed + row * stride_undisturbed, channel, inside))
        out += rows * width
    z = load(stream + row * stride_stream, channel, inside)
    scale = load_scale(weight, channel, inside, OFFSET)
    shift = epsilon * normalize(z, inside, width, eps, CENTRED)[1]
    for sample in range(SAMPLES):
        nu = probe_tile(0, row, sample, step, seed_low, seed_high, GROUPS, GAUSSIAN)
        y = perturbed(z, scale, shift, nu, inside, width, eps, CENTRED)[0] * scale
        if bias is not None:
            y += load(bias, channel, inside)
        store(out + sample * rows * width, channel, inside, y)


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
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    IN_MEMORY: tl.constexpr,
):
    """Gradients of z, γ and β; each program takes a run of rows and computes the same probes again.

    partial_weight and partial_bias (or None) are (programs, width) float32, as in `norm_step_backward`; IN_MEMORY
    adds to them there, which must be 0, where a row leaves no registers for sums.
    """
    program = tl.program_id(0).to(tl.int64)
    eps, epsilon = tl.cast(eps, tl.float32), tl.cast(epsilon, tl.float32)
    share = tl.cdiv(rows, tl.num_programs(0))
    channel = channels(0, GROUPS)
    inside = channel < width
    weight_sum = tl.zeros((GROUPS, 32), tl.float32)
    bias_sum = tl.zeros((GROUPS, 32), tl.float32)
    for row in range(program * share, tl.minimum((program + 1) * share, rows)):
        z = load(stream + row * stride_stream, channel, inside)
        scale = load_scale(weight, channel, inside, OFFSET)
        shift = epsilon * normalize(z, inside, width, eps, CENTRED)[1]
        grad = tl.zeros((GROUPS, 32), tl.float32)
        pull = 0.0
        for sample in range(SAMPLES):
            nu = probe_tile(0, row, sample, step, seed_low, seed_high, GROUPS, GAUSSIAN)
            g = load(grad_copies + sample * stride_sample + row * stride_row, channel, inside)
            own, of_scale, of_shift = perturbed_gradient(g, z, scale, shift, nu, inside, width, eps, CENTRED)
            grad += own
            pull += of_shift
            weight_sum = add_rows(partial_weight, program, weight_sum, of_scale, channel, inside, width, IN_MEMORY)
            if partial_bias is not None:
                bias_sum = add_rows(partial_bias, program, bias_sum, g, channel, inside, width, IN_MEMORY)
        # shift = ε/σ and ∂(1/σ)/∂z = −ẑ/(σ² d).
        hat, r = normalize(z, inside, width, eps, CENTRED)
        store(grad_stream + row * width, channel, inside, grad - hat * (epsilon * pull * r * r / width))
    if not IN_MEMORY:
        store(partial_weight + program * width, channel, inside, weight_sum)
        if partial_bias is not None:
            store(partial_bias + program * width, channel, inside, bias_sum)


@triton.jit
def add_rows(partial, program, total, addend, channel, inside, width, IN_MEMORY: tl.constexpr):
    """Add to a program's sum over its rows, kept in registers or in its row of `partial`."""
    if IN_MEMORY:
        into = partial + program * width + channel
        tl.store(into, tl.load(into, mask=inside, other=0.0) + addend, mask=inside)
        return total
    return total + addend
