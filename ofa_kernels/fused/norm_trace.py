"""`reference.norm_trace`, keeping only its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ofa_kernels.fused.mlp_trace import BLOCK, refuse_gradients
from ofa_kernels.fused.precision import full_precision
from ofa_kernels.reference.norm_trace import check_norm_trace
from ofa_kernels.reference.stream import moments, widen


def norm_trace(
    stream: Tensor,
    weight: Tensor,
    image: Tensor,
    trace: Tensor,
    *,
    eps: float,
    kind: str = "rms",
    offset: float = 0.0,
    shift: Tensor | None = None,
) -> Tensor:
    """As `reference.norm_trace`; differentiable once, in stream, weight, image and trace.

    Raises:
        ValueError: unknown `kind`, or shapes that do not match.
        RuntimeError: `shift` requires a gradient, which only the reference has.
    """
    check_norm_trace(stream, weight, image, trace, kind, shift)
    refuse_gradients(shift=shift)
    result: Tensor = _NormTrace.apply(stream, weight, image, trace, shift, eps, kind, offset)
    return result


class _NormTrace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        weight: Tensor,
        image: Tensor,
        trace: Tensor,
        shift: Tensor | None,
        eps: float,
        kind: str,
        offset: float,
    ) -> Tensor:
        ctx.save_for_backward(stream, weight, image, trace, shift)
        ctx.settings = eps, kind, offset
        result = trace.new_empty(trace.shape)
        flat, traces = result.view(-1), trace.reshape(-1)
        with full_precision(stream):
            scale = widen(weight) + offset
            for rows, z, x in _blocks(stream, image, shift):
                z, rstd = _normal(z, eps, kind)
                # Σ z γ x as a product with γ reads every row once.
                along = ((z * x) @ scale).div_(z.shape[-1])
                flat[rows] = (traces[rows] - rstd * along) * rstd.square()
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stream, weight, image, trace, shift = ctx.saved_tensors
        eps, kind, offset = ctx.settings
        d_stream, d_image, d_trace = (x.new_empty(x.shape) for x in (stream, image, trace))
        to_stream, to_image = (_rows(x) for x in (d_stream, d_image))
        grads, traces, to_trace = grad.reshape(-1), trace.reshape(-1), d_trace.view(-1)
        with full_precision(stream):
            scale = widen(weight) + offset
            d_weight = torch.zeros_like(scale)
            for rows, z, x in _blocks(stream, image, shift):
                z, rstd = _normal(z, eps, kind)
                width, square = z.shape[-1], rstd.square()
                product = z * x
                along = (product @ scale).div_(width)
                own = grads[rows] * square
                to_trace[rows] = own
                d_along = own * rstd / -width
                d_weight += d_along @ product
                d_rstd = grads[rows] * (2 * rstd * traces[rows] - 3 * square * along)
                # ∂(1/σ)/∂z = −z/(σ³ d); z is centred, and so is what it is multiplied by.
                through = x.mul_(scale) if shift is not None else x * scale
                through.mul_(d_along.unsqueeze(-1)).addcmul_((d_rstd * rstd * square / -width).unsqueeze(-1), z)
                if kind == "layer":
                    through -= through.mean(-1, keepdim=True)
                to_stream[rows] = through
                to_image[rows] = (z * scale).mul_(d_along.unsqueeze(-1))
        return d_stream, d_weight.to(weight.dtype), d_image, d_trace, None, None, None, None


def _blocks(stream: Tensor, image: Tensor, shift: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of the stream and of A ñ in float32, as many at a time as a cache holds; all at once on a GPU."""
    z, x = _rows(stream), _rows(image)
    size = max(1, len(z))
    if z.device.type == "cpu":
        size = max(1, BLOCK * torch.get_num_threads() // max(1, z.shape[1]))
    for first in range(0, len(z), size):
        rows = slice(first, first + size)
        wide = widen(x[rows])
        yield rows, widen(z[rows]), wide if shift is None else wide - widen(shift)


def _normal(z: Tensor, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    """(z − μ, 1/σ)"""
    mean, rstd = moments(z, eps, kind)
    return (z if mean is None else z - mean.unsqueeze(-1)), rstd


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
