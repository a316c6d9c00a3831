"""What the closed form needs of the weights and the norm scale alone: M, c_v and c; see docs/theory.md.

They change when γ does, once per optimizer step, and are computed again only then. Their gradient in γ is written by
hand: nothing of the size of a weight is kept for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

Constants = tuple[Tensor, ...]

BLOCK = 32768
"""Elements of a weight that are worked on at a time on a CPU."""


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
    """The constants of one branch, as long as γ and the weights are what they were."""

    products: Products
    centred: bool
    values: Constants | None = field(default=None, repr=False)

    def forget(self) -> None:
        """Compute them anew the next time."""
        self.values = None

    def compute(self, scale: Tensor) -> Constants:
        """Compute them for γ = `scale`, (d,) in float32 or wider."""
        # Outside inference mode: the next pass may have gradients, and these values with it.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(scale.device.type, enabled=False):
            self.values = self.products.forward(scale.detach(), self.centred)
        return self.values

    def at(self, scale: Tensor) -> Constants:
        """The constants for γ = `scale`, differentiable in it; computed now if they were not."""
        values = self.compute(scale) if self.values is None else self.values
        result: Constants = _Constants.apply(scale, self.products, self.centred, *values)
        return result


class _Constants(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, products: Products, centred: bool, *values: Tensor) -> Constants:
        ctx.products, ctx.centred = products, centred
        ctx.save_for_backward(scale)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        with torch.autocast(scale.device.type, enabled=False):
            grad = ctx.products.backward(scale, ctx.centred, grads)
        return grad, None, None, *(None for _ in grads)


@dataclass(frozen=True)
class MlpProducts:
    """c[k] = (W G W_d)_kk of the gate's and, for a gated MLP, the up projection's W.

    `weights` returns (W_g, W_u or None, W_d), (f, d), (f, d) and (d, f), as they are stored.
    """

    weights: Any

    def forward(self, scale: Tensor, centred: bool) -> Constants:
        """(c_g,) or (c_g, c_u), (f,) each."""
        weights = [weight for weight in self.weights()[:2] if weight is not None]
        down, square = self.weights()[2], scale.square()
        constants = [scale.new_empty(len(weight)) for weight in weights]
        for rows in _blocks(weights[0]):
            # Transposed while it is small enough to stay in the cache; it may be the weight itself, so not in place.
            back = down[:, rows].mT.to(scale.dtype).contiguous()
            beside = back @ scale / len(scale) if centred else None
            scaled = back * square
            for constant, weight in zip(constants, weights, strict=True):
                own = weight[rows].to(scale.dtype)
                constant[rows] = (own * scaled).sum(1)
                if beside is not None:
                    constant[rows] -= (own @ scale) * beside
        return tuple(constants)

    def backward(self, scale: Tensor, centred: bool, grads: tuple[Tensor, ...]) -> Tensor:
        """2γ ⊙ diag K − (K + Kᵀ)γ/d, K = Σ Wᵀ diag(grad) W_dᵀ."""
        gate, up, down = self.weights()
        diagonal, crossed = torch.zeros_like(scale), torch.zeros_like(scale)
        for rows in _blocks(gate):
            weighted = gate[rows].to(scale.dtype) * grads[0][rows].unsqueeze(1)
            if up is not None:
                weighted.addcmul_(up[rows].to(scale.dtype), grads[1][rows].unsqueeze(1))
            back = down[:, rows].mT.to(scale.dtype).contiguous()
            if centred:
                crossed += (back @ scale) @ weighted + (weighted @ scale) @ back
            diagonal += weighted.mul_(back).sum(0)
        grad = 2 * scale * diagonal
        return grad - crossed / len(scale) if centred else grad


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of a weight, some at a time: what is made of them stays in a cache, or at least small."""
    rows, columns = weight.shape
    size = max(1, (BLOCK if weight.device.type == "cpu" else 1 << 24) // columns)
    for first in range(0, rows, size):
        yield slice(first, first + size)


@dataclass(frozen=True)
class AttentionProducts:
    """M_q = W_q G W_o and M_k = W_k G W_o, (H, width, width), and c_v = tr(W_v G W_o), (H,), of every query head.

    `weights` returns W_q (H, width, d), W_k and W_v (K, width, d), and W_o (H, d, width).
    """

    weights: Any

    def forward(self, scale: Tensor, centred: bool) -> Constants:
        """(M_q, M_k, c_v)."""
        query, key, value, output = self._per_query_head()
        scaled = output * scale.square().unsqueeze(1)
        to_query, to_key = query @ scaled, key @ scaled
        to_value = (value.mT * scaled).sum((1, 2))
        if centred:
            beside = (scale @ output).unsqueeze(1) / len(scale)
            to_query = to_query - (query @ scale).unsqueeze(2) * beside
            to_key = to_key - (key @ scale).unsqueeze(2) * beside
            to_value = to_value - ((value @ scale) * beside.squeeze(1)).sum(1)
        return to_query, to_key, to_value

    def backward(self, scale: Tensor, centred: bool, grads: tuple[Tensor, ...]) -> Tensor:
        """As for an MLP, with K = Σ_h L_h W_oᵀ and L = W_qᵀ M̄_q + W_kᵀ M̄_k + c̄_v W_vᵀ."""
        query, key, value, output = self._per_query_head()
        left = value.mT * grads[2].view(-1, 1, 1)
        left = torch.baddbmm(left, query.mT, grads[0])
        left = torch.baddbmm(left, key.mT, grads[1])
        grad = 2 * scale * (left * output).sum((0, 2))
        if centred:
            through = left @ (scale @ output).unsqueeze(2) + output @ (scale @ left).unsqueeze(2)
            grad -= through.sum(0).squeeze(1) / len(scale)
        return grad

    def _per_query_head(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        query, key, value, output = self.weights()
        groups = len(query) // len(key)
        return query, key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0), output
