"""`norm_step` on a GPU: shapes, autograd and launches; what it computes is in `reference.norm_step`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ofa_kernels import reference
from ofa_kernels.ops.launching import Arguments, Derivative, ScaleGradients, as_rows, operation, run
from ofa_kernels.reference.stream import moments, upcast


def norm_step(
    residual: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: str = "rms",
    offset: float = 0.0,
    measured: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.norm_step`, in one sweep forward and one backward; differentiable as often as the reference."""
    reference.check_norm(residual, weight, bias, kind)
    if update is not None:
        reference.check_same_shape("update", update, "residual", residual)
    stream, normalized, sqnorm, rstd, _ = call(residual, update, weight, bias, eps, kind == "layer", offset, measured)
    if update is None:
        return residual, normalized, torch.zeros_like(rstd), rstd
    return stream, normalized, sqnorm, rstd


def normalize(
    stream: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: str = "rms",
    offset: float = 0.0,
) -> Tensor:
    """As `reference.normalize`."""
    reference.check_norm(stream, weight, bias, kind)
    normalized: Tensor = call(stream, None, weight, bias, eps, kind == "layer", offset, False)[1]
    return normalized


def forward(
    residual: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    offset: float,
    measured: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel; `stream` and `update_sqnorm` are empty without an update, `mean` unless centred."""
    from ofa_kernels.kernels.norm_step import norm_step_forward

    outputs = empty(residual, update, weight, bias, eps, centred, offset, measured)
    stream, normalized, sqnorm, rstd, mean = outputs
    width = residual.shape[-1]
    z, u = as_rows(residual, width), None if update is None else as_rows(update, width)
    run(
        norm_step_forward,
        rstd.numel(),
        residual,
        width,
        z,
        u,
        weight,
        bias,
        None if u is None else stream,
        normalized,
        None if u is None else sqnorm,
        rstd,
        mean if centred else None,
        width,
        z.stride(0),
        None if u is None else u.stride(0),
        eps,
        CENTRED=centred,
        OFFSET=offset,
    )
    return outputs


def empty(residual: Tensor, update: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of the forward pass, uninitialized."""
    rows, centred = residual.shape[:-1], others[3]

    def scalars(wanted: bool) -> Tensor:
        return torch.empty(rows if wanted else (0,), dtype=torch.float32, device=residual.device)

    return (
        residual.new_empty(residual.shape if update is not None else (0,)),
        residual.new_empty(residual.shape),
        scalars(update is not None),
        scalars(True),
        scalars(centred),
    )


def backward(
    stream: Tensor,
    update: Tensor | None,
    weight: Tensor,
    rstd: Tensor,
    mean: Tensor,
    grad_stream: Tensor | None,
    grad_normalized: Tensor | None,
    grad_sqnorm: Tensor | None,
    grad_rstd: Tensor | None,
    centred: bool,
    offset: float,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernel; `grad_update` is empty if it equals `grad_residual`."""
    from ofa_kernels.kernels.norm_step import norm_step_backward

    width, rows = stream.shape[-1], rstd.numel()
    z = as_rows(stream, width)
    through_stream = None if grad_stream is None else as_rows(grad_stream, width)
    through_norm = None if grad_normalized is None else as_rows(grad_normalized, width)
    grad_residual = stream.new_empty(stream.shape)
    grad_update = stream.new_empty(stream.shape if grad_sqnorm is not None else (0,))
    sums = ScaleGradients(norm_step_backward, rows, stream, width, biased=biased, written=through_norm is not None)
    run(
        norm_step_backward,
        sums.programs if rows else 0,
        stream,
        width,
        z,
        None if grad_sqnorm is None or update is None else as_rows(update, width).contiguous(),
        weight,
        rstd,
        mean if centred else None,
        through_stream,
        through_norm,
        None if grad_sqnorm is None else grad_sqnorm.contiguous(),
        None if grad_rstd is None else grad_rstd.contiguous(),
        grad_residual,
        grad_update if grad_sqnorm is not None else None,
        sums.weight,
        sums.bias,
        rows,
        width,
        z.stride(0),
        0 if through_stream is None else through_stream.stride(0),
        0 if through_norm is None else through_norm.stride(0),
        CENTRED=centred,
        OFFSET=offset,
    )
    return grad_residual, grad_update, *sums.total(weight)


def empty_gradients(
    stream: Tensor, update: Tensor | None, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of the backward pass, uninitialized."""
    grad_sqnorm, biased = others[4], others[-1]
    return (
        stream.new_empty(stream.shape),
        stream.new_empty(stream.shape if grad_sqnorm is not None else (0,)),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape if biased else (0,)),
    )


def _save(ctx: Any, inputs: Arguments, output: tuple[Tensor, ...]) -> None:
    residual, update, weight, bias, ctx.eps, ctx.centred, ctx.offset, measured = inputs
    stream, _, sqnorm, rstd, mean = output
    ctx.biased, ctx.adds = bias is not None, update is not None
    ctx.set_materialize_grads(False)
    if not measured:
        ctx.mark_non_differentiable(sqnorm)
    ctx.save_for_backward(stream if ctx.adds else residual, update if measured else None, weight, rstd, mean)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_stream, grad_normalized, grad_sqnorm, grad_rstd, _ = grads
    saved = ctx.saved_tensors
    gradients: Callable[..., Any] = call_backward
    # Grad mode is on if create_graph=True, and the backward kernel has no derivative.
    if torch.is_grad_enabled() or any(map(_is_batched, grads)):
        gradients = partial(_gradients_written_out, eps=ctx.eps)
    grad_residual, grad_update, grad_weight, grad_bias = gradients(
        *saved,
        grad_stream if ctx.adds else None,
        grad_normalized,
        grad_sqnorm if ctx.adds else None,
        grad_rstd,
        ctx.centred,
        ctx.offset,
        ctx.biased,
    )
    return (
        grad_residual,
        None if not ctx.adds else grad_residual if grad_sqnorm is None else grad_update,
        None if grad_normalized is None else grad_weight,
        None if grad_normalized is None or not ctx.biased else grad_bias,
        None,
        None,
        None,
        None,
    )


def _is_batched(grad: Tensor | None) -> bool:
    """Whether a gradient is batched (`is_grads_batched` or vmap): it has no storage that a kernel could read."""
    if grad is None:
        return False
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad)


def _gradients_written_out(
    stream: Tensor,
    update: Tensor | None,
    weight: Tensor,
    rstd: Tensor,
    mean: Tensor,
    grad_stream: Tensor | None,
    grad_normalized: Tensor | None,
    grad_sqnorm: Tensor | None,
    grad_rstd: Tensor | None,
    centred: bool,
    offset: float,
    biased: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `backward`, from plain operations; recomputes 1/σ and μ, since the kernel's carry no graph."""
    z = upcast(stream)
    mu, own_rstd = moments(z, eps, "layer" if centred else "rms")
    r = own_rstd.unsqueeze(-1)
    hat = (z if mu is None else z - mu.unsqueeze(-1)) * r
    g = torch.zeros_like(z) if grad_normalized is None else upcast(grad_normalized)
    h = g * (upcast(weight) + offset)
    along = (h * hat).mean(-1, keepdim=True)
    if grad_rstd is not None:
        along = along + grad_rstd.unsqueeze(-1) * r / z.shape[-1]
    grad = (h - hat * along - (h.mean(-1, keepdim=True) if centred else 0.0)) * r
    if grad_stream is not None:
        grad = grad + grad_stream
    grad_update = grad.new_empty(0)
    if grad_sqnorm is not None and update is not None:
        grad_update = grad + 2.0 * grad_sqnorm.unsqueeze(-1) * upcast(update)
    sums = ((g * hat).reshape(-1, z.shape[-1]).sum(0), g.reshape(-1, z.shape[-1]).sum(0))
    return grad.to(stream.dtype), grad_update.to(stream.dtype), *(one.to(weight.dtype) for one in sums)  # type: ignore[return-value]


call_backward = operation("norm_step_backward", backward, empty_gradients)
call = operation("norm_step", forward, empty, Derivative(_save, _differentiate))
