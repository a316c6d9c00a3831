"""What tests of trainers share: models that may be in training mode, and what a trainer's steps did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import ofa
from ofa.regularizers.attach import Regularizers


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with every rate 0, because trainers put it into training mode."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)
    return model


class WeightOfPenalty(TrainerCallback):
    """Replaces the penalty by a number of its own, whose gradient is the weight that a step gave to the penalty."""

    def __init__(self, reg: Regularizers) -> None:
        self.penalty = torch.zeros((), requires_grad=True)
        self.of_steps: list[float] = []
        reg.penalty = lambda: self.penalty  # type: ignore[method-assign]

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Keep the weight of the step that is about to be taken."""
        self.of_steps.append(0.0 if self.penalty.grad is None else float(self.penalty.grad))
        self.penalty.grad = None


class Gradients(TrainerCallback):
    """The gradients of every optimizer step, before it is taken."""

    def __init__(self) -> None:
        self.of_steps: list[Tensor] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        """Keep them."""
        self.of_steps += [p.grad.clone() for p in model.parameters() if p.grad is not None]


def gradients_of_steps(make: Callable[..., Any], model: nn.Module, **options: Any) -> list[Tensor]:
    """Train with both terms in the model's own loss; the gradients of every parameter in every step."""
    gradients = Gradients()
    with ofa.fused_regularizers(model, 1.0, 1.0, into_loss=True, **options):
        make(model, callbacks=[gradients]).train()
    assert max(float(gradient.abs().max()) for gradient in gradients.of_steps) > 1e-2
    return gradients.of_steps
