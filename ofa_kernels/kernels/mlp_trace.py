"""The activation of an MLP, its change along its own input, and its share of a trace, for every row in one sweep.

Nothing here needs a row as a whole, so that rows are walked in tiles of a size that fits the registers easily; how many
there are is a number of the run time, and one binary serves rows of any number of tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.tile import channels, load, load_if_any, store

ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_ZERO = tl.constexpr(0.3989422804014327)
"""1/√(2π)."""
INNER = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)
"""tanh's argument in gelu_tanh is √(2/π) (x + 0.044715 x³)."""


@triton.jit
def mlp_trace_forward(
    gate,
    up,
    gate_trace,
    up_trace,
    gate_shift,
    up_shift,
    hidden,
    stack,
    trace,
    width,
    stride_gate,
    stride_up,
    stride_hidden,
    GROUPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Hidden, tangent and trace of a gated or plain MLP; one program per row.

        stack[0] = φ(g) ⊙ u,   stack[1] = φ'(g) ⊙ u ⊙ (g − b_g) + φ(g) ⊙ (u − b_u),   trace = Σ φ'(g) u c_g + φ(g) c_u

    gate = g, up = u (or None: u = 1 and there is nothing of c_u and b_u) and hidden (or None; stack[0] as it is stored
    instead) are (rows, width), stack is (2, rows, width), trace (rows,) float32; gate_trace = c_g, up_trace = c_u and
    the shifts b_g and b_u (or None) are (width,).
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    total = tl.zeros((GROUPS, 32), tl.float32)
    for tile in range(tl.cdiv(width, GROUPS * 32)):
        channel = channels(tile, GROUPS)
        inside = channel < width
        g = load(gate + row * stride_gate, channel, inside)
        value, slope, _ = curve(g, ACTIVATION)
        tangent = slope * (g - load_if_any(gate_shift, channel, inside))
        along = slope * load(gate_trace, channel, inside)
        if up is not None:
            u = load(up + row * stride_up, channel, inside)
            tangent = u * tangent + value * (u - load_if_any(up_shift, channel, inside))
            along = u * along + value * load(up_trace, channel, inside)
            value *= u
        if hidden is not None:
            value = load(hidden + row * stride_hidden, channel, inside)
        total += along
        store(stack + row * width, channel, inside, value)
        store(stack + (rows + row) * width, channel, inside, tangent)
    tl.store(trace + row, tl.sum(total))


@triton.jit(do_not_specialize=["rows"])
def mlp_trace_backward(
    gate,
    up,
    gate_trace,
    up_trace,
    gate_shift,
    up_shift,
    grad_stack,
    grad_trace,
    grad_gate,
    grad_up,
    partial_gate,
    partial_up,
    rows,
    width,
    stride_gate,
    stride_up,
    stride_part,
    stride_row,
    GROUPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Gradients of gate, up, c_g and c_u; each program takes one tile of a run of rows.

        ∂gate = φ' ⊙ ((y₀ + y₁) ⊙ u + y₁ ⊙ (u − b_u) + s c_u) + φ'' ⊙ u ⊙ w,   w = y₁ ⊙ (g − b_g) + s c_g
        ∂up = φ ⊙ (y₀ + y₁) + φ' ⊙ w,   ∂c_g = Σ s φ' ⊙ u,   ∂c_u = Σ s φ

    and without up: ∂gate = φ' ⊙ (y₀ + y₁) + φ'' ⊙ w. grad_stack = (y₀, y₁), (2, rows, width), and grad_trace = s,
    (rows,) float32, may be None. The partial sums are (runs, width) float32, each over the rows of its run in their
    order; without grad_trace neither is written, without up neither grad_up nor partial_up.
    """
    tiles = tl.cdiv(width, GROUPS * 32)
    program = tl.program_id(0).to(tl.int64)
    run = program // tiles
    share = tl.cdiv(rows, tl.num_programs(0) // tiles)
    channel = channels((program % tiles).to(tl.int32), GROUPS)
    inside = channel < width
    c_g, b_g = load(gate_trace, channel, inside), load_if_any(gate_shift, channel, inside)
    if up is not None:
        c_u, b_u = load(up_trace, channel, inside), load_if_any(up_shift, channel, inside)
    gate_sum = tl.zeros((GROUPS, 32), tl.float32)
    up_sum = tl.zeros((GROUPS, 32), tl.float32)
    for row in range(run * share, tl.minimum((run + 1) * share, rows)):
        g = load(gate + row * stride_gate, channel, inside)
        value, slope, bend = curve(g, ACTIVATION)
        both = tl.zeros((GROUPS, 32), tl.float32)
        along = tl.zeros((GROUPS, 32), tl.float32)
        if grad_stack is not None:
            y_1 = load(grad_stack + stride_part + row * stride_row, channel, inside)
            both = load(grad_stack + row * stride_row, channel, inside) + y_1
            along = y_1 * (g - b_g)
        if grad_trace is not None:
            s = tl.load(grad_trace + row)
            along += s * c_g
        if up is not None:
            u = load(up + row * stride_up, channel, inside)
            store(grad_up + row * width, channel, inside, value * both + slope * along)
            both *= u
            if grad_stack is not None:
                both += y_1 * (u - b_u)
            if grad_trace is not None:
                both += s * c_u
                gate_sum += s * (slope * u)
                up_sum += s * value
            bend *= u
        elif grad_trace is not None:
            gate_sum += s * slope
        store(grad_gate + row * width, channel, inside, slope * both + bend * along)
    if grad_trace is not None:
        store(partial_gate + run * width, channel, inside, gate_sum)
        if up is not None:
            store(partial_up + run * width, channel, inside, up_sum)


@triton.jit
def curve(x, ACTIVATION: tl.constexpr):
    """φ, φ' and φ'' of an activation, named as in `reference.ACTIVATIONS`."""
    if ACTIVATION == "silu":
        found = _silu(x)
    elif ACTIVATION == "gelu":
        found = _gelu(x)
    elif ACTIVATION == "gelu_tanh":
        found = _gelu_tanh(x)
    else:
        found = _relu(x)
    return found


@triton.jit
def _silu(x):
    p, q = _logistic(x)
    return x * p, p + x * (p * q), p * q * (2.0 + x * (q - p))


@triton.jit
def _gelu(x):
    p = 0.5 + 0.5 * tl.erf(x * ROOT_HALF)
    density = tl.exp(-0.5 * x * x) * DENSITY_AT_ZERO
    return x * p, p + x * density, density * (2.0 - x * x)


@triton.jit
def _gelu_tanh(x):
    # (1 + tanh y)/2 is p, the logistic function of 2y: p' = 2pq y' and p'' = 2 (q − p) p' y' + 2pq y'' with q = 1 − p.
    square = x * x
    p, q = _logistic(x * (2.0 * INNER) * (square * CUBIC + 1.0))
    inner = square * (3.0 * INNER * CUBIC) + INNER
    # pq is 0 long before the powers of x that it multiplies overflow.
    p_slope = 2.0 * p * q * inner
    p_bend = 2.0 * ((q - p) * p_slope * inner + p * q * (x * (6.0 * INNER * CUBIC)))
    return x * p, p + x * p_slope, 2.0 * p_slope + x * p_bend


@triton.jit
def _relu(x):
    # Written so that what is not a number stays what it is; the slope at 0 is 0, as PyTorch has it.
    return tl.where(x <= 0.0, 0.0, x), tl.where(x > 0.0, 1.0, 0.0), tl.zeros_like(x)


@triton.jit
def _logistic(x):
    """σ(x) and 1 − σ(x), neither of which overflows or cancels."""
    small = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + small)
    small *= large
    return tl.where(x < 0.0, small, large), tl.where(x < 0.0, large, small)
