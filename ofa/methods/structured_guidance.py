"""Structured gradient guidance: consistent direction and controlled magnitude of the gradient.

The abstract of arXiv 2506.00726 names these two, and an alignment with other tasks; its equations are not public, and
the formulation here is ours (docs/theory.md, "Structured gradient guidance"). With the tuned parameters θ, g = ∇CE(θ),
ĝ = g/‖g‖ and the constants r, τ of a `Reference`,

    L = CE + λ_d (1 − ⟨ĝ, r̂⟩) + λ_m max(0, ‖g‖ − τ)²

The added terms depend on θ only through g. So ∇L = g + H u, with H the Hessian of CE and u their gradient in g.
The gradient of all parameters is one vector (n,), in float64 on the CPU: n is small, but 1/‖g‖ may be large.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ofa.errors import InputError

Loss = Callable[[], Tensor]

DECAY = 0.9
"""β of the moving average of gradients: r ← β r + (1 − β) g after every step."""

TWICE_DIFFERENTIABLE = ("sdpa", "eager")
"""Attention implementations with a second derivative; sdpa has it in its math backend."""


@dataclass(frozen=True)
class Weights:
    """Weights of the terms λ_d, λ_m, at least 0; for the first-order variant, shares between 0 and 1.

    Raises:
        InputError: a weight is negative or not finite.
    """

    direction: float
    magnitude: float

    def __post_init__(self) -> None:
        """Check the weights."""
        for name, value in vars(self).items():
            if not (value >= 0 and math.isfinite(value)):
                raise InputError(f"the setting {name}={value!r} is not usable: it must be a number that is at least 0")


@dataclass(frozen=True)
class Reference:
    """The constants that a gradient is compared with: r (n,), and τ, or None if not known yet."""

    average: Tensor
    threshold: float | None = None


@dataclass(frozen=True)
class GuidedStep:
    """‖g‖ of one step, and the cosines of g with the previous g (None in the first step) and with r."""

    gradient_norm: float
    to_previous: float | None
    to_average: float


def outer_gradient(gradient: Tensor, reference: Reference, weights: Weights) -> Tensor:
    """u, the gradient of the added terms in g, (n,).

    u = 2 λ_m max(0, ‖g‖ − τ) ĝ − (λ_d/‖g‖)(r̂ − ⟨ĝ, r̂⟩ ĝ)

    It is 0 if g is 0: then g has no direction, and its length does not exceed τ.
    """
    norm = float(gradient.norm())
    result = torch.zeros_like(gradient)
    if norm == 0:
        return result
    unit = gradient / norm
    if reference.threshold is not None:
        result += 2 * weights.magnitude * max(0.0, norm - reference.threshold) * unit
    average = _unit(reference.average)
    return result - weights.direction / norm * (average - (unit @ average) * unit)


def first_order_gradient(gradient: Tensor, reference: Reference, shares: Weights) -> Tensor:
    """The gradient (n,) changed in the direction of the terms' goals, without a second derivative.

    1. direction a > 0: if ⟨g, r⟩ < 0, r is projected out of g; else g becomes (1 − a) g + a ‖g‖ r̂, rescaled to ‖g‖.
    2. magnitude: if ‖g‖ > τ, that share of the excess is removed.
    """
    if shares.direction > 0:
        gradient = _turned(gradient, _unit(reference.average), shares.direction)
    if reference.threshold is not None and (norm := float(gradient.norm())) > reference.threshold:
        gradient = gradient * (1 - shares.magnitude * (1 - reference.threshold / norm))
    return gradient


class StructuredGuidance(ABC):
    """The guidance of one run (see `ofa.training.loop.Guidance`): its moving average, its threshold and its log.

    - r starts as the gradient on all shots and is updated with g after each step.
    - τ is the median of ‖g‖ over the first epoch, during which there is no magnitude term.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights, self.steps = weights, list[GuidedStep]()
        self._previous: Tensor | None = None
        self._threshold: float | None = None

    def begin(self, parameters: Sequence[nn.Parameter], losses: Sequence[Loss]) -> None:
        """Start r from the losses, as many as an epoch has steps, that sum to the loss over all shots."""
        self._parameters, self._steps_per_epoch = tuple(parameters), len(losses)
        self._average = _gradient(losses, self._parameters)

    def backward(self, loss: Loss) -> float:
        """Fill the gradients of one step, and return its loss in nats."""
        reference = Reference(self._average, self._threshold)
        value, gradient, guided = self._guide(loss, reference)
        for parameter, part in zip(self._parameters, _split(guided, self._parameters), strict=True):
            parameter.grad = part
        self._remember(gradient)
        return value

    @property
    def notes(self) -> dict[str, object]:
        """The log as JSON values: per step ‖g‖ and the cosines of `GuidedStep`; the deviation of ‖g‖; τ."""
        norms = [step.gradient_norm for step in self.steps]
        return {
            "gradient_norm": [_digits(norm) for norm in norms],
            "cosine_to_previous": [_digits(step.to_previous) for step in self.steps],
            "cosine_to_average": [_digits(step.to_average) for step in self.steps],
            "gradient_norm_std": _digits(statistics.pstdev(norms)) if norms else None,
            "gradient_norm_threshold": _digits(self._threshold),
        }

    @abstractmethod
    def _guide(self, loss: Loss, reference: Reference) -> tuple[float, Tensor, Tensor]:
        """The loss, its gradient g and the gradient to step along."""

    def _remember(self, gradient: Tensor) -> None:
        previous = None if self._previous is None else _cosine(gradient, self._previous)
        self.steps.append(GuidedStep(float(gradient.norm()), previous, _cosine(gradient, self._average)))
        self._previous = gradient
        self._average = DECAY * self._average + (1 - DECAY) * gradient
        if len(self.steps) == self._steps_per_epoch:
            self._threshold = statistics.median(step.gradient_norm for step in self.steps)


class ExactGuidance(StructuredGuidance):
    """∇L = g + H u, H u by a second backward pass."""

    def _guide(self, loss: Loss, reference: Reference) -> tuple[float, Tensor, Tensor]:
        curved = self.weights.direction > 0 or (reference.threshold is not None and self.weights.magnitude > 0)
        with sdpa_kernel(SDPBackend.MATH) if curved else nullcontext():
            value = loss()
            parts = torch.autograd.grad(value, self._parameters, create_graph=curved, materialize_grads=True)
            gradient = _flat(parts)
            outer = outer_gradient(gradient, reference, self.weights)
            if not outer.any():
                return value.item(), gradient, gradient
            size = outer.norm()
            # Along a unit vector, because u may overflow the parameters' dtype.
            directions = _split(outer / size, self._parameters)
            inner = torch.stack([(g * d).sum().cpu() for g, d in zip(parts, directions, strict=True)]).sum()
            product = _flat(torch.autograd.grad(inner, self._parameters, materialize_grads=True))
        return value.item(), gradient, gradient + size * product


class FirstOrderGuidance(StructuredGuidance):
    """Step along `first_order_gradient`; all weights are shares.

    Raises:
        InputError: a weight is larger than 1.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        for name, value in vars(weights).items():
            if value > 1:
                raise InputError(f"the setting {name}={value!r} is not usable: here it is a share, at most 1")

    def _guide(self, loss: Loss, reference: Reference) -> tuple[float, Tensor, Tensor]:
        value = loss()
        gradient = _flat(torch.autograd.grad(value, self._parameters, materialize_grads=True))
        return value.item(), gradient, first_order_gradient(gradient, reference, self.weights)


def check_attention(model: nn.Module) -> None:
    """Refuse attention that has no second derivative.

    Raises:
        InputError: the model is configured for an attention implementation that is not in `TWICE_DIFFERENTIABLE`.
    """
    for module in model.modules():
        used = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if used is not None and used not in TWICE_DIFFERENTIABLE:
            raise InputError(
                f"exact guidance differentiates attention twice, which {used!r} does not support; load the model with "
                "attn_implementation='sdpa' or 'eager', or use guided-first-order"
            )


def _turned(gradient: Tensor, average: Tensor, share: float) -> Tensor:
    along, norm = gradient @ average, gradient.norm()
    if along < 0:
        return gradient - along * average
    mixed = (1 - share) * gradient + share * norm * average
    return mixed if norm == 0 else mixed * (norm / mixed.norm())


def _unit(vector: Tensor) -> Tensor:
    """The normalized vector; 0 stays 0."""
    norm = vector.norm()
    return vector if norm == 0 else vector / norm


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(_unit(one) @ _unit(other))


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _gradient(losses: Sequence[Loss], parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradient of the sum of the losses, (n,)."""
    gradients = (_flat(torch.autograd.grad(loss(), parameters, materialize_grads=True)) for loss in losses)
    return torch.stack(list(gradients)).sum(0)


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().cpu().double().flatten() for part in parts])


def _split(vector: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    parts = vector.split([parameter.numel() for parameter in parameters])
    return [part.view_as(own).to(own.device, own.dtype) for part, own in zip(parts, parameters, strict=True)]
