"""The settings of one training run."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ofa.errors import InputError

STEPS, EPOCHS = 60, 7
"""The default length of a run, chosen by docs/studies.md: so many steps, and no example seen less often than that."""


class TrainingConfig(BaseModel):
    """Settings of one run; the defaults are the paper's (see docs/theory.md for the regularizers' options) but for its
    length, 60 epochs in the paper, and for the sharpness, weighed by 1e-3 and differentiated through everything there.

    `step_ratio=0` and `sharpness=0` together are plain norm tuning. The batch of an optimizer step holds
    `batch_size × accumulation` examples; accumulation changes the memory it takes, not the objective. `max_steps` goes
    before `epochs`; without both see `total_steps`. `stop_loss` ends a run after the epoch whose mean loss is below it;
    `label_loss` weighs the loss over the label words. Both are in study and off (docs/studies.md).
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
        """Optimizer steps of a run whose epochs have so many: as many as were asked for, else the default."""
        if self.max_steps is not None:
            return self.max_steps
        return max(STEPS, EPOCHS * steps_per_epoch) if self.epochs is None else self.epochs * steps_per_epoch

    @property
    def regularizer_options(self) -> dict[str, Any]:
        """The settings that `fused_regularizers` takes."""
        names = ("step_ratio", "sharpness", "estimator", "granularity", "samples", "epsilon", "probe", "convention")
        return {name: getattr(self, name) for name in (*names, "gradient", "every", "radial", "tokens", "seed")}


def checked_config(**settings: Any) -> TrainingConfig:
    """The configuration of these settings.

    Raises:
        InputError: a setting is unknown or out of range; it is named.
    """
    try:
        return TrainingConfig(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name, message = first["loc"][0], first["msg"].lower()
        raise InputError(f"the setting {name}={first['input']!r} is not usable: {message}") from error
