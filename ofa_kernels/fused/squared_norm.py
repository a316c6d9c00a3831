"""`reference.squared_norm` in one pass over the rows forward, and one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofa_kernels.reference.stream import widen


def squared_norm(update: Tensor) -> Tensor:
    """As `reference.squared_norm`; differentiable as often as one likes, in forward mode too."""
    result: Tensor = _SquaredNorm.apply(update)
    return result


class _SquaredNorm(torch.autograd.Function):
    @staticmethod
    def forward(update: Tensor) -> Tensor:
        return torch.linalg.vector_norm(widen(update), dim=-1).square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (update,) = ctx.saved_tensors
        return (widen(update) * (2 * grad).unsqueeze(-1)).to(update.dtype)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (update,) = ctx.saved_tensors
        return 2 * (widen(update) * widen(tangent)).sum(-1)
