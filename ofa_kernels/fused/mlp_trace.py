"""`reference.mlp_trace`, keeping only the pre-activations and working on rows that fit a processor's cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ofa_kernels.fused.precision import full_precision
from ofa_kernels.reference.mlp_trace import check_mlp
from ofa_kernels.reference.stream import wide_dtype, widen

BLOCK = 131072
"""Elements of a block per thread: a handful of float32 tensors of this size stay in a core's second-level cache."""


def mlp_trace(
    gate: Tensor,
    up: Tensor | None,
    gate_trace: Tensor,
    up_trace: Tensor | None = None,
    gate_shift: Tensor | None = None,
    up_shift: Tensor | None = None,
    hidden: Tensor | None = None,
    *,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """As `reference.mlp_trace`; differentiable once, in gate, up, gate_trace and up_trace.

    Raises:
        ValueError: unknown `activation`, or shapes that do not match.
        RuntimeError: a shift requires a gradient, which only the reference has.
    """
    check_mlp(gate, up, gate_trace, up_trace, gate_shift, up_shift, hidden, activation)
    refuse_gradients(gate_shift=gate_shift, up_shift=up_shift)
    given = gate, up, gate_trace, up_trace, gate_shift, up_shift, None if hidden is None else hidden.detach()
    stack, trace = _MlpTrace.apply(*given, activation)
    return stack, trace


def refuse_gradients(**constants: Tensor | None) -> None:
    """Refuse constants that are asked for a gradient: leaving it out would be wrong without a word.

    Raises:
        RuntimeError: the first one.
    """
    for name, tensor in constants.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} requires a gradient, which only the reference computes; detach it, or set "
                "OFA_KERNELS=reference in the environment"
            )


class _MlpTrace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor | None,
        gate_trace: Tensor,
        up_trace: Tensor | None,
        gate_shift: Tensor | None,
        up_shift: Tensor | None,
        hidden: Tensor | None,
        activation: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(gate, up, gate_trace, up_trace, gate_shift, up_shift)
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        stack = gate.new_empty((2, *gate.shape))
        trace = gate.new_empty(gate.shape[:-1], dtype=wide_dtype(gate.dtype))
        hidden_out, tangent_out = (_rows(part) for part in stack.unbind())
        traces = trace.view(-1)
        c_g, (c_u, b_g, b_u) = widen(gate_trace), _widen_all(up_trace, gate_shift, up_shift)
        if hidden is not None:
            stack[0].copy_(hidden)
        with full_precision(gate):
            curve = CURVES[activation]
            for rows, g, u in _blocks(gate, up):
                phi, slope = curve.value(g), curve.slope_times(g, torch.ones_like(g) if u is None else u)
                h = hidden_out[rows]
                if hidden is None:
                    h.copy_(phi if u is None else phi * u)
                traces[rows] = slope @ c_g
                # φ'(g) u (g − b_g) + φ(g)(u − b_u), the last of which is the hidden row but for the shift.
                moved = slope.mul_(g if b_g is None else g - b_g)
                if u is not None:
                    assert c_u is not None
                    traces[rows].addmv_(phi, c_u)
                    moved += widen(h)
                    if b_u is not None:
                        moved.addcmul_(phi, b_u, value=-1)
                tangent_out[rows] = moved
        return stack, trace

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_stack: Tensor | None, grad_trace: Tensor | None) -> tuple[Tensor | None, ...]:
        gate, up, *vectors = ctx.saved_tensors
        c_g, (c_u, b_g, b_u) = widen(vectors[0]), _widen_all(*vectors[1:])
        grad_gate, grad_up = gate.new_empty(gate.shape), None if up is None else up.new_empty(up.shape)
        grad_c_g, grad_c_u = torch.zeros_like(c_g), None if c_u is None else torch.zeros_like(c_u)
        zero = gate.new_zeros(1)
        parts = (zero.expand(2, *gate.shape) if grad_stack is None else grad_stack).unbind()
        from_hidden, from_tangent = (_rows(part) for part in parts)
        weights = _rows((zero.expand(gate.shape[:-1]) if grad_trace is None else grad_trace).unsqueeze(-1))
        to_gate, to_up = _rows(grad_gate), None if grad_up is None else _rows(grad_up)
        with full_precision(gate):
            curve = CURVES[ctx.activation]
            for rows, g, u in _blocks(gate, up):
                y_h, y_t, s = (widen(part[rows]) for part in (from_hidden, from_tangent, weights))
                phi = curve.value(g)
                # What multiplies φ' u in tangent and trace, and what multiplies φ' in hidden, tangent and trace.
                along = torch.addcmul(y_t * g if b_g is None else y_t * (g - b_g), s, c_g)
                both = y_h + y_t
                if u is None:
                    to_gate[rows] = curve.slope_times(g, both).add_(curve.bend_times(g, phi, along))
                    grad_c_g += s.squeeze(-1) @ curve.slope_times(g, torch.ones_like(g))
                    continue
                assert to_up is not None
                assert c_u is not None
                assert grad_c_u is not None
                through = torch.addcmul(s * c_u, both + y_t, u)
                if b_u is not None:
                    through.addcmul_(y_t, b_u, value=-1)
                grad_c_g += s.squeeze(-1) @ curve.slope_times(g, u)
                grad_c_u += s.squeeze(-1) @ phi
                to_up[rows] = curve.slope_times(g, along).addcmul_(phi, both)
                to_gate[rows] = curve.slope_times(g, through).add_(curve.bend_times(g, phi, along.mul_(u)))
        grads = (None if c is None else c.to(v.dtype) for c, v in ((grad_c_g, vectors[0]), (grad_c_u, vectors[1])))
        return grad_gate, grad_up, *grads, None, None, None, None


def _blocks(gate: Tensor, up: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Rows of the pre-activations in float32, as many at a time as a cache holds; all at once on a GPU."""
    g, u = _rows(gate), None if up is None else _rows(up)
    size = max(1, BLOCK * torch.get_num_threads() // max(1, g.shape[1])) if g.device.type == "cpu" else max(1, len(g))
    for first in range(0, len(g), size):
        rows = slice(first, first + size)
        yield rows, widen(g[rows]), None if u is None else widen(u[rows])


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _widen_all(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if vector is None else widen(vector) for vector in vectors]


@dataclass(frozen=True)
class Curve:
    """An activation: φ(x), φ'(x) y and φ''(x) y, each in as few passes over the rows as PyTorch has kernels for.

    The last is given φ(x) as well, and may write to y.
    """

    value: Callable[[Tensor], Tensor]
    slope_times: Callable[[Tensor, Tensor], Tensor]
    bend_times: Callable[[Tensor, Tensor, Tensor], Tensor]


def _silu_bend(x: Tensor, phi: Tensor, y: Tensor) -> Tensor:
    """φ'' = σ(1 − σ)(2 + x − 2φ)"""
    return torch.ops.aten.sigmoid_backward(torch.add(x, phi, alpha=-2).add_(2).mul_(y), torch.sigmoid(x))


def _gelu_bend(x: Tensor, phi: Tensor, y: Tensor) -> Tensor:
    """φ'' = (2 − x²) exp(−x²/2)/√(2π)"""
    square = x * x
    return torch.exp(-0.5 * square).mul_(y).mul_(square.neg_().add_(2)).mul_(1 / math.sqrt(2 * math.pi))


def _gelu_tanh_bend(x: Tensor, phi: Tensor, y: Tensor) -> Tensor:
    """φ'' = t' + x t''/2; t' = (1 − t²) w', t'' = (1 − t²)(w'' − 2t w'²), t = tanh w, w = √(2/π)(x + 0.044715 x³)"""
    factor, cubic = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    t = torch.tanh(factor * x * (1 + cubic * square))
    inner = factor * (1 + 3 * cubic * square)
    return (1 - t * t) * (inner + 0.5 * x * (6 * factor * cubic * x - 2 * t * inner * inner)) * y


CURVES: dict[str, Curve] = {
    "silu": Curve(F.silu, lambda x, y: torch.ops.aten.silu_backward(y, x), _silu_bend),
    "gelu": Curve(F.gelu, lambda x, y: torch.ops.aten.gelu_backward(y, x), _gelu_bend),
    "gelu_tanh": Curve(
        partial(F.gelu, approximate="tanh"),
        lambda x, y: torch.ops.aten.gelu_backward(y, x, approximate="tanh"),
        _gelu_tanh_bend,
    ),
    "relu": Curve(
        F.relu, lambda x, y: torch.ops.aten.threshold_backward(y, x, 0), lambda x, phi, y: torch.zeros_like(x)
    ),
}
