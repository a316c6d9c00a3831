"""`displace` on a GPU: shapes, autograd and launches; what it computes is in `reference.displace`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofa_kernels.ops.launching import (
    Arguments,
    Derivative,
    as_rows,
    as_stack,
    configuration,
    key,
    operation,
    run,
)
from ofa_kernels.philox import check_probe


def displace(
    stream: Tensor,
    preconditioner: Tensor,
    *,
    samples: int = 1,
    epsilon: float,
    seed: int,
    step: int = 0,
    probe: str = "rademacher",
) -> Tensor:
    """As `reference.displace`."""
    check_probe(probe)
    return call(stream, preconditioner.expand(stream.shape), samples, epsilon, seed, step, probe == "gaussian")


def forward(
    stream: Tensor, preconditioner: Tensor, samples: int, epsilon: float, seed: int, step: int, gaussian: bool
) -> Tensor:
    """Launch the forward kernel."""
    from ofa_kernels.kernels.displace import displace_forward

    copies = empty(stream, preconditioner, samples)
    width = stream.shape[-1]
    z, per_row = as_rows(stream, width), width > 1 and preconditioner.stride(-1) == 0
    # 1/σ is one number per row: as a diagonal it would be twice as many bytes as a bfloat16 row, written and read.
    p = as_rows(preconditioner[..., :1], 1) if per_row else as_rows(preconditioner, width)
    run(
        displace_forward,
        z.shape[0] * configuration(displace_forward, stream, width).tiles,
        stream,
        width,
        z,
        p,
        copies,
        width,
        z.stride(0),
        p.stride(0),
        epsilon,
        *key(seed, step),
        SAMPLES=samples,
        PER_ROW=per_row,
        GAUSSIAN=gaussian,
    )
    return copies


def empty(stream: Tensor, preconditioner: Tensor, samples: int, *settings: object) -> Tensor:
    return stream.new_empty((samples, *stream.shape))


def backward(
    grad_copies: Tensor, epsilon: float, seed: int, step: int, gaussian: bool, preconditioned: bool
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel; the second gradient is float32, empty unless `preconditioned`."""
    from ofa_kernels.kernels.displace import displace_backward

    grad_stream, grad_preconditioner = empty_gradients(grad_copies, preconditioned)
    width = grad_copies.shape[-1]
    grads = as_stack(grad_copies, width)
    run(
        displace_backward,
        grads.shape[1] * configuration(displace_backward, grad_copies, width).tiles,
        grad_copies,
        width,
        grads,
        grad_stream,
        grad_preconditioner if preconditioned else None,
        width,
        grads.stride(0),
        grads.stride(1),
        epsilon,
        *key(seed, step),
        SAMPLES=grads.shape[0],
        GAUSSIAN=gaussian,
    )
    return grad_stream, grad_preconditioner


def empty_gradients(grad_copies: Tensor, *settings: object) -> tuple[Tensor, Tensor]:
    shape, preconditioned = grad_copies.shape[1:], settings[-1]
    return (
        grad_copies.new_empty(shape),
        grad_copies.new_empty(shape if preconditioned else (0,), dtype=torch.float32),
    )


def _save(ctx: Any, inputs: Arguments, output: Tensor) -> None:
    _, _, _, ctx.epsilon, ctx.seed, ctx.step, ctx.gaussian = inputs


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    preconditioned = ctx.needs_input_grad[1]
    grad_stream, grad_preconditioner = call_backward(
        grad, ctx.epsilon, ctx.seed, ctx.step, ctx.gaussian, preconditioned
    )
    return (grad_stream, grad_preconditioner if preconditioned else None, *[None] * 5)


call_backward = operation("displace_backward", backward, empty_gradients)
call = operation("displace", forward, empty, Derivative(_save, _differentiate))
