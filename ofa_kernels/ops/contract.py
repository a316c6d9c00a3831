"""`contract` on a GPU: shapes, autograd and launches; what it computes is in `reference.contract`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofa_kernels import reference
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


def contract(
    base: Tensor, copies: Tensor, *, seed: int, step: int = 0, probe: str = "rademacher"
) -> tuple[Tensor, Tensor]:
    """As `reference.contract`; the backward pass recomputes the probes and does not read the copies."""
    reference.check_stack(base, copies)
    check_probe(probe)
    return call(base, copies, seed, step, probe == "gaussian")


def squared_norm(update: Tensor) -> Tensor:
    """As `reference.squared_norm`."""
    none = update.new_empty((0, *update.shape))
    return call(update, none, 0, 0, False)[1]


def forward(base: Tensor, copies: Tensor, seed: int, step: int, gaussian: bool) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel."""
    from ofa_kernels.kernels.contract import contract_forward

    products, sqnorm = empty(base, copies, seed, step, gaussian)
    width = base.shape[-1]
    b, stack = as_rows(base, width), as_stack(copies, width)
    run(
        contract_forward,
        b.shape[0],
        base,
        width,
        b,
        stack,
        products,
        sqnorm,
        width,
        b.stride(0),
        stack.stride(0),
        stack.stride(1),
        *key(seed, step),
        SAMPLES=stack.shape[0],
        GAUSSIAN=gaussian,
    )
    return products, sqnorm


def empty(base: Tensor, copies: Tensor, seed: int, step: int, gaussian: bool) -> tuple[Tensor, Tensor]:
    shape = copies.shape[:-1]
    return base.new_empty(shape, dtype=torch.float32), base.new_empty(shape[1:], dtype=torch.float32)


def backward(
    base: Tensor,
    grad_products: Tensor | None,
    grad_sqnorm: Tensor | None,
    samples: int,
    seed: int,
    step: int,
    gaussian: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel; the copies' gradient is empty if the products have none."""
    from ofa_kernels.kernels.contract import contract_backward

    grad_base, grad_copies = empty_gradients(base, grad_products, grad_sqnorm, samples, seed, step, gaussian)
    width = base.shape[-1]
    b = as_rows(base, width)
    run(
        contract_backward,
        b.shape[0] * configuration(contract_backward, base, width).tiles,
        base,
        width,
        b,
        None if grad_products is None else grad_products.contiguous(),
        None if grad_sqnorm is None else grad_sqnorm.contiguous(),
        grad_base,
        None if grad_products is None else grad_copies,
        width,
        b.stride(0),
        *key(seed, step),
        SAMPLES=samples,
        GAUSSIAN=gaussian,
    )
    return grad_base, grad_copies


def empty_gradients(
    base: Tensor, grad_products: Tensor | None, grad_sqnorm: Tensor | None, samples: int, *settings: object
) -> tuple[Tensor, Tensor]:
    return (
        base.new_empty(base.shape),
        base.new_empty((samples, *base.shape) if grad_products is not None else (0,)),
    )


def _save(ctx: Any, inputs: Arguments, output: tuple[Tensor, Tensor]) -> None:
    base, copies, ctx.seed, ctx.step, ctx.gaussian = inputs
    ctx.samples = copies.shape[0]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(base)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    (base,) = ctx.saved_tensors
    grad_base, grad_copies = call_backward(base, *grads, ctx.samples, ctx.seed, ctx.step, ctx.gaussian)
    return grad_base, None if grads[0] is None else grad_copies, None, None, None


call_backward = operation("contract_backward", backward, empty_gradients)
call = operation("contract", forward, empty, Derivative(_save, _differentiate))
