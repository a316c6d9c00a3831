"""What the closed form needs of the weights and the norm scale alone: M, c_v and c; see docs/theory.md.

They change when γ does, once per optimizer step, and are computed again only then. Their gradient in γ is written by
hand: nothing of the size of a weight is kept for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ofa.anatomy import NormView
from ofa_kernels import dispatch

Constants = tuple[Tensor, ...]


class Products(Protocol):
    """Traces of weights with G = Γ² − c γγᵀ/d in between, for one branch."""

    def forward(self, scale: Tensor, centred: bool) -> Constants:
        """The constants for γ = `scale`, (d,); c = 1 if `centred` (LayerNorm), else 0."""
        ...

    def backward(self, scale: Tensor, centred: bool, grads: tuple[Tensor, ...]) -> Tensor:
        """The gradient in γ, (d,)."""
        ...


@dataclass
class Kept:
    """The constants of one branch and the γ that they are of, as long as that and the weights are what they were."""

    products: Products
    centred: bool
    scale: Tensor | None = field(default=None, repr=False)
    values: Constants | None = field(default=None, repr=False)

    def forget(self) -> None:
        """Compute them anew the next time."""
        self.scale = self.values = None

    def compute(self, scale: Tensor) -> None:
        """Compute them for γ = `scale`, (d,) in float32 or wider, which nobody may change."""
        # Outside inference mode: the next pass may have gradients, and these values with it.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(scale.device.type, enabled=False):
            self.scale = scale.detach()
            self.values = self.products.forward(self.scale, self.centred)

    def at(self, norm: NormView) -> Constants:
        """The constants of a norm's γ, differentiable in its weight; computed now if they were not."""
        if self.values is None:
            self.compute(norm.scale)
        assert self.values is not None
        result: Constants = _Constants.apply(norm.weight, self.scale, self.products, self.centred, *self.values)
        return result


class _Constants(torch.autograd.Function):
    """γ is the weight and a number, so that the gradient in one is that in the other."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, products: Products, centred: bool, *values: Tensor
    ) -> Constants:
        ctx.products, ctx.centred, ctx.dtype = products, centred, weight.dtype
        # Not the weight: FSDP2 takes the memory of whole parameters back before they have their gradient. A constant
        # that nothing depends on has a gradient of zeros, not None: autograd makes them.
        ctx.save_for_backward(scale)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        with torch.autocast(scale.device.type, enabled=False):
            grad = ctx.products.backward(scale, ctx.centred, grads)
        return grad.to(ctx.dtype), None, None, None, *(None for _ in grads)


@dataclass(frozen=True)
class MlpProducts:
    """c[k] = (W G W_d)_kk of the gate's and, for a gated MLP, the up projection's W: `reference.mlp_constants`.

    `weights` returns (W_g, W_u or None, W_d), (f, d), (f, d) and (d, f), as they are stored.
    """

    weights: Callable[[], tuple[Tensor, Tensor | None, Tensor]]

    def forward(self, scale: Tensor, centred: bool) -> Constants:
        """(c_g,) or (c_g, c_u), (f,) each."""
        return dispatch.mlp_constants(*self.weights(), scale, centred)

    def backward(self, scale: Tensor, centred: bool, grads: tuple[Tensor, ...]) -> Tensor:
        """See `reference.mlp_constants_gradient`."""
        return dispatch.mlp_constants_gradient(*self.weights(), scale, grads, centred)


@dataclass(frozen=True)
class AttentionProducts:
    """M_q = W_q G W_o, M_k = W_k G W_o and c_v = tr(W_v G W_o) of every query head: `reference.attention_constants`.

    `weights` returns W_q (H, width, d), W_k and W_v (K, width, d), and W_o (H, d, width), as they are stored.
    """

    weights: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]

    def forward(self, scale: Tensor, centred: bool) -> Constants:
        """(M_q, M_k, c_v), (H, width, width) twice and (H,)."""
        return dispatch.attention_constants(*self.weights(), scale, centred)

    def backward(self, scale: Tensor, centred: bool, grads: tuple[Tensor, ...]) -> Tensor:
        """See `reference.attention_constants_gradient`."""
        return dispatch.attention_constants_gradient(*self.weights(), scale, grads, centred)
