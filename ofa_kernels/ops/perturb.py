"""`perturb` on a GPU: shapes, autograd and launches; what it computes is in `reference.perturb`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ofa_kernels import reference
from ofa_kernels.ops.launching import (
    Arguments,
    Derivative,
    ScaleGradients,
    as_rows,
    as_stack,
    key,
    operation,
    run,
    slots,
)
from ofa_kernels.philox import check_probe


def perturb(
    stream: Tensor,
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
    scaled: bool = True,
    unperturbed: Tensor | None = None,
) -> Tensor:
    """As `reference.perturb`, with one read of the stream and probes in registers; differentiable if `scaled`."""
    reference.check_norm(stream, weight, bias, kind)
    check_probe(probe)
    if unperturbed is not None:
        reference.check_same_shape("unperturbed", unperturbed, "stream", stream)
    norm = eps, kind == "layer", offset, scaled
    return call(stream, unperturbed, weight, bias, *norm, samples, epsilon, seed, step, probe == "gaussian")


def forward(
    stream: Tensor,
    unperturbed: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    offset: float,
    scaled: bool,
    samples: int,
    epsilon: float,
    seed: int,
    step: int,
    gaussian: bool,
) -> Tensor:
    """Launch the forward kernel."""
    from ofa_kernels.kernels.perturb import perturb_forward

    copies = empty(stream, unperturbed, weight, bias, eps, centred, offset, scaled, samples)
    width = stream.shape[-1]
    z, front = as_rows(stream, width), None if unperturbed is None else as_rows(unperturbed, width)
    run(
        perturb_forward,
        z.shape[0],
        stream,
        width,
        z,
        front,
        weight,
        bias,
        copies,
        width,
        z.stride(0),
        0 if front is None else front.stride(0),
        eps,
        epsilon,
        *key(seed, step),
        SAMPLES=samples,
        CENTRED=centred,
        OFFSET=offset,
        SCALED=scaled,
        GAUSSIAN=gaussian,
    )
    return copies


def empty(stream: Tensor, unperturbed: Tensor | None, *others: Any) -> Tensor:
    """The copies, uninitialized."""
    first, samples = stream if unperturbed is None else unperturbed, others[6]
    return first.new_empty((samples + (unperturbed is not None), *stream.shape))


def backward(
    stream: Tensor,
    weight: Tensor,
    grad_copies: Tensor,
    eps: float,
    centred: bool,
    offset: float,
    epsilon: float,
    seed: int,
    step: int,
    gaussian: bool,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel; the gradient of β is empty without a shift."""
    from ofa_kernels.kernels.perturb import perturb_backward

    width = stream.shape[-1]
    z, grads = as_rows(stream, width), as_stack(grad_copies, width)
    grad_stream = stream.new_empty(stream.shape)
    sums = ScaleGradients(perturb_backward, z.shape[0], stream, width, biased=biased, written=True)
    run(
        perturb_backward,
        sums.programs if z.shape[0] else 0,
        stream,
        width,
        z,
        weight,
        grads,
        grad_stream,
        sums.weight,
        sums.bias,
        z.shape[0],
        width,
        z.stride(0),
        grads.stride(0),
        grads.stride(1),
        eps,
        epsilon,
        *key(seed, step),
        SAMPLES=grads.shape[0],
        SLOTS=slots(grads.shape[0]),
        CENTRED=centred,
        OFFSET=offset,
        GAUSSIAN=gaussian,
    )
    return grad_stream, *sums.total(weight)


def empty_gradients(
    stream: Tensor, weight: Tensor, grad_copies: Tensor, *settings: object
) -> tuple[Tensor, Tensor, Tensor]:
    biased = settings[-1]
    return (
        stream.new_empty(stream.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape if biased else (0,)),
    )


def _save(ctx: Any, inputs: Arguments, output: Tensor) -> None:
    stream, unperturbed, weight, bias, *settings = inputs
    ctx.eps, ctx.centred, ctx.offset, ctx.scaled, _, ctx.epsilon, ctx.seed, ctx.step, ctx.gaussian = settings
    ctx.front, ctx.biased = unperturbed is not None, bias is not None
    ctx.save_for_backward(stream, weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.scaled:
        raise RuntimeError("perturb has no derivative unless scaled; set OFA_KERNELS=reference in the environment")
    settings = ctx.eps, ctx.centred, ctx.offset, ctx.epsilon, ctx.seed, ctx.step, ctx.gaussian, ctx.biased
    grad_copies = grad[1:] if ctx.front else grad
    grad_stream, grad_weight, grad_bias = call_backward(*ctx.saved_tensors, grad_copies, *settings)
    front = grad[0] if ctx.front else None
    return (grad_stream, front, grad_weight, grad_bias if ctx.biased else None, *[None] * 9)


call_backward = operation("perturb_backward", backward, empty_gradients)
call = operation("perturb", forward, empty, Derivative(_save, _differentiate))
