"""`norm_trace` on a GPU: schema, shapes, autograd and launches; what it computes is in `reference.norm_trace`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofa_kernels.fused.mlp_trace import refuse_gradients
from ofa_kernels.ops.launching import Derivative, as_rows, library, operation, run, runs_and_tiles
from ofa_kernels.reference.norm_trace import check_norm_trace

library.define(
    "norm_trace(Tensor stream, Tensor weight, Tensor image, Tensor trace, Tensor? shift, float eps, bool centred, "
    "float offset) -> (Tensor result, Tensor saved)"
)
library.define(
    "norm_trace_backward(Tensor stream, Tensor weight, Tensor image, Tensor trace, Tensor? shift, Tensor saved, "
    "Tensor grad, bool centred, float offset) "
    "-> (Tensor grad_stream, Tensor grad_weight, Tensor grad_image, Tensor grad_trace)"
)


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
    """As `reference.norm_trace`, in one sweep forward and one backward, which reads no row twice.

    Differentiable once, in stream, weight, image and trace; stream and image may have different dtypes. The shift is a
    constant. Kept for the backward pass are the inputs and two numbers per row, four for `kind="layer"`.

    Raises:
        ValueError: unknown `kind`, or shapes that do not match.
        RuntimeError: `shift` requires a gradient, which only the reference has.
    """
    check_norm_trace(stream, weight, image, trace, kind, shift)
    refuse_gradients(shift=shift)
    result: Tensor
    result, _ = call(stream, weight, image, trace, shift, eps, kind == "layer", offset)
    return result


def forward(
    stream: Tensor,
    weight: Tensor,
    image: Tensor,
    trace: Tensor,
    shift: Tensor | None,
    eps: float,
    centred: bool,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel. `saved` is 1/σ and the mean along the stream, then, centred, the two that it takes."""
    from ofa_kernels.kernels.norm_trace import norm_trace_forward

    result, saved = empty(stream, weight, image, trace, shift, eps, centred, offset)
    width = stream.shape[-1]
    z, x = as_rows(stream, width), as_rows(image, width)
    run(
        norm_trace_forward,
        z.shape[0],
        stream,
        width,
        z,
        weight.contiguous(),
        x,
        trace.contiguous(),
        None if shift is None else shift.contiguous(),
        result,
        saved,
        width,
        z.stride(0),
        x.stride(0),
        eps,
        CENTRED=centred,
        OFFSET=offset,
    )
    return result, saved


def empty(
    stream: Tensor,
    weight: Tensor,
    image: Tensor,
    trace: Tensor,
    shift: Tensor | None,
    eps: float,
    centred: bool,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """The outputs of the forward pass, unwritten."""
    rows = stream.shape[:-1]
    return (
        stream.new_empty(rows, dtype=torch.float32),
        stream.new_empty((4 if centred else 2, *rows), dtype=torch.float32),
    )


def backward(
    stream: Tensor,
    weight: Tensor,
    image: Tensor,
    trace: Tensor,
    shift: Tensor | None,
    saved: Tensor,
    grad: Tensor,
    centred: bool,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernel."""
    from ofa_kernels.kernels.norm_trace import norm_trace_backward

    width = stream.shape[-1]
    z, x = as_rows(stream, width), as_rows(image, width)
    grad_stream, grad_image, grad_trace = (tensor.new_empty(tensor.shape) for tensor in (stream, image, trace))
    rows = z.shape[0]
    runs, tiles = runs_and_tiles(norm_trace_backward, rows, stream, width)
    partial_weight = stream.new_empty((runs, width), dtype=torch.float32)
    run(
        norm_trace_backward,
        runs * tiles,
        stream,
        width,
        z,
        weight.contiguous(),
        x,
        trace.contiguous(),
        None if shift is None else shift.contiguous(),
        saved,
        grad.contiguous(),
        grad_stream,
        grad_image,
        grad_trace,
        partial_weight,
        rows,
        width,
        z.stride(0),
        x.stride(0),
        CENTRED=centred,
        OFFSET=offset,
    )
    return grad_stream, partial_weight.sum(0).to(weight.dtype), grad_image, grad_trace


def empty_gradients(
    stream: Tensor,
    weight: Tensor,
    image: Tensor,
    trace: Tensor,
    shift: Tensor | None,
    saved: Tensor,
    grad: Tensor,
    centred: bool,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of the backward pass, unwritten."""
    return (
        stream.new_empty(stream.shape),
        weight.new_empty(weight.shape),
        image.new_empty(image.shape),
        trace.new_empty(trace.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, ctx.centred, ctx.offset = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    grads = call_backward(*ctx.saved_tensors, grad, ctx.centred, ctx.offset)
    return *grads, None, None, None, None


call_backward = operation("norm_trace_backward", backward, empty_gradients)
call = operation("norm_trace", forward, empty, Derivative(_save, _differentiate))
