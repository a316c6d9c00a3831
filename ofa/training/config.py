"""The settings of one training run."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ofa.errors import InputError

STEPS, EPOCHS = 60, 7
"""The default length of a run: at least `STEPS` steps and `EPOCHS` epochs (chosen in docs/studies.md)."""


class TrainingConfig(BaseModel):
    """Settings of one run; docs/theory.md describes the regularizers' options.

    The defaults are the paper's with two exceptions: the paper trains for 60 epochs, and it weighs the sharpness by
    1e-3 and differentiates it through everything.

    `step_ratio=0` and `sharpness=0` together are plain norm tuning. The batch of an optimizer step holds
    `batch_size × accumulation` examples; accumulation reduces memory and leaves the objective unchanged. `max_steps`
    overrides `epochs`; without both see `total_steps`. `stop_loss` ends a run after the first epoch whose mean loss is
    below it; `label_loss` weighs the loss over the label words. Both are off by default (docs/studies.md).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int | None = Field(None, ge=1)
    max_steps: int | None = Field(None, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-3, ge=0)
    warmup: float = Field(0.05, ge=0, le=1)
    label_loss: float = Field(0.0, ge=0)
    stop_loss: float | None = Field(None, gt=0)
    batch_size: int = Field(4, ge=1)
    accumulation: int = Field(1, ge=1)
    seed: int = Field(42, ge=-(2**63), lt=2**63)
    step_ratio: float = Field(1e-2, ge=0)
    sharpness: float = Field(1.0, ge=0)
    estimator: str = "auto"
    granularity: str = "sublayer"
    samples: int = Field(1, ge=1)
    epsilon: float | None = Field(None, gt=0)
    probe: str = "rademacher"
    convention: str = "theory"
    gradient: str = "preconditioner"
    every: int = Field(1, ge=1)
    radial: str = "channels"
    tokens: str = "all"

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of a run with `steps_per_epoch`: as set by `max_steps` or `epochs`, else the default."""
        if self.max_steps is not None:
            return self.max_steps
        return max(STEPS, EPOCHS * steps_per_epoch) if self.epochs is None else self.epochs * steps_per_epoch

    @property
    def regularizer_options(self) -> dict[str, Any]:
        """The settings that `fused_regularizers` takes."""
        names = ("step_ratio", "sharpness", "estimator", "granularity", "samples", "epsilon", "probe", "convention")
        return {name: getattr(self, name) for name in (*names, "gradient", "every", "radial", "tokens", "seed")}


def checked_config(**settings: Any) -> TrainingConfig:
    """A `TrainingConfig` of these settings.

    Raises:
        InputError: a setting is unknown or out of range.
    """
    try:
        return TrainingConfig(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name, message = first["loc"][0], first["msg"].lower()
        raise InputError(f"the setting {name}={first['input']!r} is not usable: {message}") from error
