"""The trace of a branch behind its norm, from one read of the stream and of the branch's image of it.

The forward pass keeps the sums of a row that its gradients need, so that the backward pass sums over no row and its
rows are walked in tiles, as those of `mlp_trace` are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.tile import channels, load, load_if_any, load_scale, merge_moments_and_sum, store


@triton.jit
def norm_trace_forward(
    stream,
    weight,
    image,
    trace,
    shift,
    result,
    saved,
    width,
    stride_stream,
    stride_image,
    eps,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """(trace − a/σ)/σ² with a = mean((z − μ) ⊙ h) and h = γ ⊙ (image − shift); one program per row.

    stream = z and image are (rows, width), each of its own dtype, weight and shift (or None) (width,), trace and result
    (rows,) float32. saved is (2, rows) float32, 1/σ and a; if CENTRED (4, rows), with μ and mean(h) behind them.
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    eps = tl.cast(eps, tl.float32)
    mu, squares, along, total = 0.0, 0.0, 0.0, 0.0
    for tile in tl.static_range(TILES):
        channel = channels(tile, GROUPS)
        inside = channel < width
        z = load(stream + row * stride_stream, channel, inside)
        x = load(image + row * stride_image, channel, inside) - load_if_any(shift, channel, inside)
        h = x * load_scale(weight, channel, inside, OFFSET)
        before, beside = mu, h if CENTRED else z * h
        mu, squares, more = merge_moments_and_sum(z, beside, inside, tile, mu, squares, width, GROUPS, CENTRED)
        if CENTRED:
            # The tiles before this one are centred at their own mean; Σ z h − μ Σ h would cancel.
            along += tl.sum((z - mu) * h) - (mu - before) * total
            total += more
        else:
            along += more
    r = tl.rsqrt(squares / width + eps)
    along /= width
    tl.store(result + row, (tl.load(trace + row).to(tl.float32) - r * along) * (r * r))
    tl.store(saved + row, r)
    tl.store(saved + rows + row, along)
    if CENTRED:
        tl.store(saved + 2 * rows + row, mu)
        tl.store(saved + 3 * rows + row, total / width)


@triton.jit(do_not_specialize=["rows"])
def norm_trace_backward(
    stream,
    weight,
    image,
    trace,
    shift,
    saved,
    grad,
    grad_stream,
    grad_image,
    grad_trace,
    partial_weight,
    rows,
    width,
    stride_stream,
    stride_image,
    GROUPS: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Gradients of stream, γ, image and trace; each program takes one tile of a run of rows.

        ∂trace = s/σ²,   q = −s/(σ³ d),   ∂image = q γ ⊙ (z − μ),   ∂γ = Σ q (z − μ) ⊙ (image − shift)
        ∂stream = q (h − mean(h)) − s (2 trace − 3 a/σ)/(σ⁴ d) (z − μ)

    grad = s, (rows,) float32; saved is what the forward pass wrote. partial_weight is (runs, width) float32, the sums
    over the rows of a run in their order.
    """
    rows = tl.cast(rows, tl.int64)
    tiles = tl.cdiv(width, GROUPS * 32)
    program = tl.program_id(0).to(tl.int64)
    run = program // tiles
    tile = (program % tiles).to(tl.int32)
    share = tl.cdiv(rows, tl.num_programs(0) // tiles)
    channel = channels(tile, GROUPS)
    inside = channel < width
    scale, without = load_scale(weight, channel, inside, OFFSET), load_if_any(shift, channel, inside)
    weight_sum = tl.zeros((GROUPS, 32), tl.float32)
    for row in range(run * share, tl.minimum((run + 1) * share, rows)):
        r, along = tl.load(saved + row), tl.load(saved + rows + row)
        own = tl.load(grad + row) * r * r
        each = own / width
        to_along = -each * r
        to_stream = each * (3.0 * r * along - 2.0 * tl.load(trace + row).to(tl.float32)) * r * r
        z = load(stream + row * stride_stream, channel, inside)
        x = load(image + row * stride_image, channel, inside) - without
        h = x * scale
        if CENTRED:
            z -= tl.load(saved + 2 * rows + row)
            h -= tl.load(saved + 3 * rows + row)
        store(grad_stream + row * width, channel, inside, to_along * h + to_stream * z)
        z *= to_along
        store(grad_image + row * width, channel, inside, z * scale)
        weight_sum += z * x
        # One of the row's programs writes its number.
        tl.store(grad_trace + row, own.to(grad_trace.dtype.element_ty), mask=tile == 0)
    store(partial_weight + run * width, channel, inside, weight_sum)
