"""`mlp_trace` on a GPU: schema, shapes, autograd and launches; what it computes is in `reference.mlp_trace`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofa_kernels.fused.mlp_trace import refuse_gradients
from ofa_kernels.ops.launching import Derivative, as_rows, as_stack, library, operation, run, runs_and_tiles
from ofa_kernels.reference.mlp_trace import check_mlp

library.define(
    "mlp_trace(Tensor gate, Tensor? up, Tensor gate_trace, Tensor? up_trace, Tensor? gate_shift, Tensor? up_shift, "
    "Tensor? hidden, str activation) -> (Tensor stack, Tensor trace)"
)
library.define(
    "mlp_trace_backward(Tensor gate, Tensor? up, Tensor gate_trace, Tensor? up_trace, Tensor? gate_shift, "
    "Tensor? up_shift, Tensor? grad_stack, Tensor? grad_trace, str activation) "
    "-> (Tensor grad_gate, Tensor grad_up, Tensor grad_gate_trace, Tensor grad_up_trace)"
)


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
    """As `reference.mlp_trace`, in one sweep forward and one backward, which reads nothing but inputs and gradients.

    Differentiable once, in gate, up, gate_trace and up_trace. The shifts are constants. What comes back to `hidden` is
    the gradient of the formula that it stands for, through gate and up; the tensor itself gets none.

    Raises:
        ValueError: unknown `activation`, or shapes that do not match.
        RuntimeError: a shift requires a gradient, which only the reference has.
    """
    check_mlp(gate, up, gate_trace, up_trace, gate_shift, up_shift, hidden, activation)
    refuse_gradients(gate_shift=gate_shift, up_shift=up_shift)
    given = gate, up, gate_trace, up_trace, gate_shift, up_shift, None if hidden is None else hidden.detach()
    return call(*given, activation)


def forward(
    gate: Tensor,
    up: Tensor | None,
    gate_trace: Tensor,
    up_trace: Tensor | None,
    gate_shift: Tensor | None,
    up_shift: Tensor | None,
    hidden: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel."""
    from ofa_kernels.kernels.mlp_trace import mlp_trace_forward

    stack, trace = empty(gate, up, gate_trace, up_trace, gate_shift, up_shift, hidden, activation)
    width = gate.shape[-1]
    g, (u, h) = as_rows(gate, width), (None if x is None else as_rows(x, width) for x in (up, hidden))
    run(
        mlp_trace_forward,
        g.shape[0],
        gate,
        width,
        g,
        u,
        *_dense(gate_trace, up_trace, gate_shift, up_shift),
        h,
        stack,
        trace,
        width,
        g.stride(0),
        0 if u is None else u.stride(0),
        0 if h is None else h.stride(0),
        ACTIVATION=activation,
    )
    return stack, trace


def empty(gate: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """The outputs of the forward pass, unwritten."""
    return gate.new_empty((2, *gate.shape)), gate.new_empty(gate.shape[:-1], dtype=torch.float32)


def backward(
    gate: Tensor,
    up: Tensor | None,
    gate_trace: Tensor,
    up_trace: Tensor | None,
    gate_shift: Tensor | None,
    up_shift: Tensor | None,
    grad_stack: Tensor | None,
    grad_trace: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernel. Gradients of what belongs to `up` are empty without it, c's without `grad_trace`."""
    from ofa_kernels.kernels.mlp_trace import mlp_trace_backward

    width = gate.shape[-1]
    g, u = as_rows(gate, width), None if up is None else as_rows(up, width)
    y = None if grad_stack is None else as_stack(grad_stack, width)
    grad_gate, grad_up = gate.new_empty(gate.shape), _empty_like(up, gate)
    rows = g.shape[0]
    runs, tiles = runs_and_tiles(mlp_trace_backward, rows, gate, width)
    vectors = [vector for vector in (gate_trace, up_trace) if vector is not None and grad_trace is not None]
    partial = gate.new_empty((max(1, len(vectors)), runs, width if vectors else 0), dtype=torch.float32)
    partial_gate, *partial_up = partial
    run(
        mlp_trace_backward,
        runs * tiles,
        gate,
        width,
        g,
        u,
        *_dense(gate_trace, up_trace, gate_shift, up_shift),
        y,
        None if grad_trace is None else grad_trace.contiguous(),
        grad_gate,
        grad_up,
        partial_gate,
        partial_up[0] if partial_up else partial_gate[:0],
        rows,
        width,
        g.stride(0),
        0 if u is None else u.stride(0),
        0 if y is None else y.stride(0),
        0 if y is None else y.stride(1),
        ACTIVATION=activation,
    )
    sums = partial.sum(1)
    of_gate, *of_up = (one.to(vector.dtype) for one, vector in zip(sums, vectors or [gate_trace], strict=True))
    return grad_gate, grad_up, of_gate, of_up[0] if of_up else of_gate.new_empty(0)


def empty_gradients(
    gate: Tensor,
    up: Tensor | None,
    gate_trace: Tensor,
    up_trace: Tensor | None,
    gate_shift: Tensor | None,
    up_shift: Tensor | None,
    grad_stack: Tensor | None,
    grad_trace: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of the backward pass, unwritten."""
    traced = grad_trace is not None
    return (
        gate.new_empty(gate.shape),
        _empty_like(up, gate),
        _empty_like(gate_trace if traced else None, gate_trace),
        _empty_like(up_trace if traced else None, gate_trace if up_trace is None else up_trace),
    )


def _empty_like(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Dense and unwritten, of the tensor's shape; nothing, like `other`, where there is no tensor."""
    return other.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)


def _dense(*vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if vector is None else vector.contiguous() for vector in vectors)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    gate, up, gate_trace, up_trace, gate_shift, up_shift, _, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gate, up, gate_trace, up_trace, gate_shift, up_shift)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    gate, up, *vectors = ctx.saved_tensors
    grad_gate, grad_up, *of_traces = call_backward(gate, up, *vectors, *grads, ctx.activation)
    gated, traced = up is not None, grads[1] is not None
    return (
        grad_gate,
        grad_up if gated else None,
        of_traces[0] if traced else None,
        of_traces[1] if traced and gated else None,
        None,
        None,
        None,
        None,
    )


call_backward = operation("mlp_trace_backward", backward, empty_gradients)
call = operation("mlp_trace", forward, empty, Derivative(_save, _differentiate))
