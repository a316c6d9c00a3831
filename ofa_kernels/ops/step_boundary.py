"""`step_boundary` on a GPU: schema, shapes, autograd and launches; its formulas are in `reference.step_boundary`."""

from __future__ import annotations

import torch
from torch import Tensor

from ofa_kernels import reference
from ofa_kernels.ops.launching import (
    Arguments,
    Context,
    Derivative,
    ScaleGradients,
    as_rows,
    as_stack,
    key,
    library,
    operation,
    run,
    slots,
)
from ofa_kernels.philox import check_probe

library.define(
    "step_boundary(Tensor residual, Tensor update, Tensor copies, Tensor weight, Tensor? bias, float eps, "
    "bool centred, float offset, SymInt samples, float epsilon, SymInt seed, SymInt step, bool gaussian) "
    "-> (Tensor stream, Tensor stack, Tensor update_sqnorm, Tensor products)"
)
library.define(
    "step_boundary_backward(Tensor stream, Tensor update, Tensor weight, Tensor? grad_stream, Tensor? grad_stack, "
    "Tensor? grad_sqnorm, Tensor? grad_products, SymInt copies, float eps, bool centred, float offset, float epsilon, "
    "SymInt seed, SymInt step, bool gaussian, bool biased) "
    "-> (Tensor grad_residual, Tensor grad_update, Tensor grad_copies, Tensor grad_weight, Tensor grad_bias)"
)


def step_boundary(
    residual: Tensor,
    update: Tensor,
    copies: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: str = "rms",
    offset: float = 0.0,
    samples: int = 1,
    epsilon: float,
    seed: int,
    step: int = 0,
    probe: str = "rademacher",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.step_boundary`, in one sweep forward and one backward; differentiable once."""
    reference.check_norm(residual, weight, bias, kind)
    reference.check_same_shape("update", update, "residual", residual)
    reference.check_stack(update, copies)
    check_probe(probe)
    norm = eps, kind == "layer", offset
    return call(residual, update, copies, weight, bias, *norm, samples, epsilon, seed, step, probe == "gaussian")


def forward(
    residual: Tensor,
    update: Tensor,
    copies: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    offset: float,
    samples: int,
    epsilon: float,
    seed: int,
    step: int,
    gaussian: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel."""
    from ofa_kernels.kernels.step_boundary import step_boundary_forward

    width = residual.shape[-1]
    outputs = empty(residual, update, copies, weight, bias, eps, centred, offset, samples)
    z, u, stack = as_rows(residual, width), as_rows(update, width), as_stack(copies, width)
    run(
        step_boundary_forward,
        z.shape[0],
        residual,
        width,
        z,
        u,
        stack,
        weight,
        bias,
        *outputs,
        width,
        z.stride(0),
        u.stride(0),
        stack.stride(0),
        stack.stride(1),
        eps,
        epsilon,
        *key(seed, step),
        COPIES=stack.shape[0],
        SAMPLES=samples,
        CENTRED=centred,
        OFFSET=offset,
        GAUSSIAN=gaussian,
    )
    return outputs


def empty(
    residual: Tensor,
    update: Tensor,
    copies: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    offset: float,
    samples: int,
    *settings: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of the forward pass, uninitialized."""
    return (
        residual.new_empty(residual.shape),
        residual.new_empty((1 + samples, *residual.shape)),
        residual.new_empty(residual.shape[:-1], dtype=torch.float32),
        residual.new_empty(copies.shape[:-1], dtype=torch.float32),
    )


def backward(
    stream: Tensor,
    update: Tensor,
    weight: Tensor,
    grad_stream: Tensor | None,
    grad_stack: Tensor | None,
    grad_sqnorm: Tensor | None,
    grad_products: Tensor | None,
    copies: int,
    eps: float,
    centred: bool,
    offset: float,
    epsilon: float,
    seed: int,
    step: int,
    gaussian: bool,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernel; `grad_update` is empty if it equals `grad_residual`, `grad_copies` if it is 0."""
    from ofa_kernels.kernels.step_boundary import step_boundary_backward

    width, rows = stream.shape[-1], stream.shape[:-1].numel()
    samples = 0 if grad_stack is None else grad_stack.shape[0] - 1
    grad_residual, grad_update, grad_copies, *_ = empty_gradients(
        stream, update, weight, grad_stream, grad_stack, grad_sqnorm, grad_products, copies, biased
    )
    sums = ScaleGradients(step_boundary_backward, rows, stream, width, biased=biased, written=grad_stack is not None)
    run(
        step_boundary_backward,
        sums.programs if rows else 0,
        stream,
        width,
        stream,
        None if grad_sqnorm is None else update.contiguous(),
        weight,
        *(
            None if grad is None else grad.contiguous()
            for grad in (grad_stream, grad_stack, grad_sqnorm, grad_products)
        ),
        grad_residual,
        grad_update if grad_update.numel() else None,
        None if grad_products is None else grad_copies,
        sums.weight,
        sums.bias,
        rows,
        width,
        eps,
        epsilon,
        *key(seed, step),
        COPIES=copies,
        SAMPLES=samples,
        SLOTS=slots(samples),
        CENTRED=centred,
        OFFSET=offset,
        GAUSSIAN=gaussian,
    )
    return grad_residual, grad_update, grad_copies, *sums.total(weight)


def empty_gradients(
    stream: Tensor,
    update: Tensor,
    weight: Tensor,
    grad_stream: Tensor | None,
    grad_stack: Tensor | None,
    grad_sqnorm: Tensor | None,
    grad_products: Tensor | None,
    copies: int,
    *settings: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of the backward pass, uninitialized."""
    biased = settings[-1]
    measured = grad_sqnorm is not None or grad_products is not None
    return (
        stream.new_empty(stream.shape),
        stream.new_empty(stream.shape if measured else (0,)),
        stream.new_empty((copies, *stream.shape) if grad_products is not None else (0,)),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape if biased else (0,)),
    )


def _save(ctx: Context, inputs: Arguments, output: tuple[Tensor, ...]) -> None:
    _, update, copies, weight, bias, *settings = inputs
    ctx.eps, ctx.centred, ctx.offset, _, ctx.epsilon, ctx.seed, ctx.step, ctx.gaussian = settings
    ctx.copies, ctx.biased = copies.shape[0], bias is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], update, weight)


def _differentiate(ctx: Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    _, grad_stack, grad_sqnorm, grad_products = grads
    settings = ctx.eps, ctx.centred, ctx.offset, ctx.epsilon, ctx.seed, ctx.step, ctx.gaussian, ctx.biased
    grad_residual, grad_update, grad_copies, grad_weight, grad_bias = call_backward(
        *ctx.saved_tensors, *grads, ctx.copies, *settings
    )
    measured = grad_sqnorm is not None or grad_products is not None
    return (
        grad_residual,
        grad_update if measured else grad_residual,
        None if grad_products is None else grad_copies,
        None if grad_stack is None else grad_weight,
        None if grad_stack is None or not ctx.biased else grad_bias,
        *[None] * 8,
    )


call_backward = operation("step_boundary_backward", backward, empty_gradients)
call = operation("step_boundary", forward, empty, Derivative(_save, _differentiate))
