"""Step ratio and sharpness as pure functions of the measurements. The derivation is in docs/theory.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ofa_kernels.reference.stream import opmath_dtype

LOWEST = -30.0
"""Softplus and its slope are below 1e-13 here, negligible in the loss, and are treated as constant below. Gradients of
e⁻⁹⁰ would be denormal numbers, which make matrix products on a CPU ten times slower."""


@dataclass(frozen=True)
class BranchTrace:
    """tr(J P) per token of every sequence, (B,), of one branch.

    `gradient` maps slopes s, (B,), to Σ_b s_b ∂tr_b/∂γ, (d,), with the curvature held fixed; if it is None, `values`
    have a graph.
    """

    values: Tensor
    gradient: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Measurements:
    """The measurements of one forward pass of B sequences through T steps; None for a term of weight 0.

    Attributes:
        step_norms: ‖Z_{t+1} − Z_t‖ over the tokens that count, (T, B), float32.
        ratios: ‖Z_{t+1} − Z_t‖ / ‖Z_t − Z_{t−1}‖, (T − 1, B).
        traces: h_t per token, (T, B), in the chosen sign convention.
        step_ratio: J = Σ_t ratios, mean over the sequences that have a real token, a scalar.
        sharpness: H = Σ_t softplus(h_t), mean over the sequences that have a real token, a scalar.
        token_squares: ‖Z_{t+1} − Z_t‖² of every token, padding included, (T, B, tokens).
        counted: the tokens that count for the step ratio, bool (B, tokens); None if all do.

    Example:
        >>> with ofa.fused_regularizers(model) as reg:
        ...     loss = model(**batch).loss
        ...     reg.measurements.traces.shape  # two branches in each of three layers, two sequences
        torch.Size([6, 2])
    """

    step_norms: Tensor | None = None
    ratios: Tensor | None = None
    traces: Tensor | None = None
    step_ratio: Tensor | None = None
    sharpness: Tensor | None = None
    token_squares: Tensor | None = None
    counted: Tensor | None = None


def step_norms(squared_norms: Tensor) -> Tensor:
    """Lengths from squared lengths; the smallest normal number keeps the gradient finite at a zero update."""
    return squared_norms.clamp_min(torch.finfo(squared_norms.dtype).tiny).sqrt()


def ratios(norms: Tensor) -> Tensor:
    """Length of each step over the length of the step before it: (T, B) → (T − 1, B)."""
    return norms[1:] / norms[:-1]


def sequence_mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Mean of values (B,) over the sequences; `real`, bool (B,), leaves out rows that are all padding."""
    if real is None:
        return values.mean()
    real = real.to(values.device)
    return torch.where(real, values, 0).sum() / real.sum().clamp_min(1)


def step_ratio(step_ratios: Tensor, real: Tensor | None = None) -> Tensor:
    """J = Σ_t ratio_t, mean over the sequences (OFA, arXiv 2505.19107, its first regularizer)."""
    return sequence_mean(step_ratios.sum(0), real)


def token_shares(mask: Tensor | None, like: Tensor) -> Tensor:
    """Weights of the tokens of a stream, (B, T, d) → (B, T): 1/n at a sequence's n real tokens, 0 at padding."""
    if mask is None:
        return torch.full(like.shape[:2], 1.0 / like.shape[1], dtype=opmath_dtype(like.dtype), device=like.device)
    mask = mask.to(like.device, opmath_dtype(like.dtype))
    return mask / mask.sum(1, keepdim=True).clamp_min(1)


def sharpness(traces: Tensor, real: Tensor | None = None) -> Tensor:
    """H = Σ_t softplus(h_t), mean over the sequences, from the traces (T, B).

    Softplus is taken per sequence, after the mean over its tokens and probes and before the mean over sequences, so
    that splitting a batch does not change the objective.
    """
    return sequence_mean(F.softplus(traces.clamp_min(LOWEST)).sum(0), real)


def sharpness_slopes(traces: Tensor, real: Tensor | None = None) -> Tensor:
    """∂H/∂h_t of every sequence, for the traces of one step, (B,)."""
    slopes = torch.sigmoid(traces) * (traces > LOWEST)
    if real is None:
        return slopes / len(traces)
    real = real.to(traces.device)
    return torch.where(real, slopes, 0) / real.sum().clamp_min(1)


def with_gradients(value: Tensor, gradients: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The value with a given gradient in each tensor; its own graph is discarded."""
    if not gradients or not torch.is_grad_enabled():
        return value
    tensors, known = zip(*gradients, strict=True)
    result: Tensor = _WithGradients.apply(value, known, *tensors)
    return result


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *((grad.to(g.device) * g) for g in ctx.gradients)


def penalty(measured: Measurements, step_ratio_weight: float, sharpness_weight: float, device: torch.device) -> Tensor:
    """λ₁ J + λ₂ H, a float32 scalar; terms that were not measured count as 0."""
    weighted = (step_ratio_weight, measured.step_ratio), (sharpness_weight, measured.sharpness)
    terms = [weight * value for weight, value in weighted if value is not None]
    return sum(terms[1:], terms[0]) if terms else torch.zeros((), device=device)
