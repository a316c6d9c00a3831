"""The settings of one training run."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from ofa.regularizers.options import RegularizerOptions, step_ratio_field

STEPS, STEPS_PER_SHOT, EPOCHS = 60, 24, 7
"""The default length of a run: `STEPS_PER_SHOT` for each shot of a class, at most `STEPS`, and at least `EPOCHS` epochs
(chosen in docs/studies.md)."""

HEAD_RATE = 1e-3
"""The default learning rate of an encoder's head (docs/encoders.md)."""

SHARE = 0.3
"""With `sharpness="auto"`: the length of the term's gradient over that of the loss (docs/studies.md)."""

RELATIVE_RATE, ABSOLUTE_RATE = 1e-2, 1e-3
"""The default learning rates of relative steps (docs/studies.md) and of the paper's."""


class TrainingConfig(RegularizerOptions):
    """Settings of one run; docs/theory.md describes the regularizers' options.

    The defaults are those of docs/studies.md; `methods.norm_tuning` has the paper's.

    `step_ratio=0` and `sharpness=0` together are plain norm tuning. The batch of an optimizer step holds
    `batch_size × accumulation` examples; accumulation reduces memory and leaves the objective unchanged. By
    default `label_loss` and `stop_loss` are off (docs/studies.md).

    Raises:
        InputError: a setting is unknown or out of range.
    """

    model_config = ConfigDict(title="Training")

    epochs: int | None = Field(
        default=None,
        ge=1,
        description=f"Passes over the shots. Without it {STEPS_PER_SHOT} optimizer steps per shot of a class, at most "
        f"{STEPS}, or {EPOCHS} passes if that is more.",
    )
    max_steps: int | None = Field(default=None, ge=1, description="Optimizer steps; overrides --epochs.")
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description=f"Peak learning rate of AdamW. Without it {RELATIVE_RATE:g}, or {ABSOLUTE_RATE:g} with "
        "--no-relative.",
    )
    head_learning_rate: float = Field(
        default=HEAD_RATE, gt=0, description="Peak learning rate of an encoder's classification head."
    )
    relative: bool = Field(
        default=True,
        description="Steps of a norm scale in proportion to its pretrained value, or all of one size as in the paper.",
    )
    step_ratio: float = step_ratio_field(default=0.0)
    sharpness: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = Field(  # type: ignore[assignment]
        default=0.0,
        description=f"Weight λ₂ of the sharpness term, or auto: in every step its gradient is {SHARE:g} times as long "
        "as the loss's.",
    )
    weight_decay: float = Field(default=1e-3, ge=0, description="AdamW's weight decay.")
    warmup: float = Field(default=0.05, ge=0, le=1, description="Share of the steps in which the learning rate rises.")
    label_loss: float = Field(default=0.0, ge=0, description="Weight of an additional loss over the label words alone.")
    stop_loss: float | None = Field(
        default=None, gt=0, description="End after the epoch whose mean loss is below this."
    )
    demonstrated_steps: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the steps with other shots in front of each prompt, for an adapter that gets "
        "demonstrations (docs/choosing.md).",
    )
    class_weights: Literal["balanced"] | None = Field(
        default=None, description="balanced: every class weighs the same in the loss, for classes of unequal size."
    )
    batch_size: int = Field(default=4, ge=1, description="Examples per forward pass.")
    accumulation: int = Field(default=1, ge=1, description="Forward passes per optimizer step.")
    seed: int = Field(
        default=42, ge=-(2**63), lt=2**63, description="Fixes the shots, the batches and the random probes."
    )

    @property
    def peak_rate(self) -> float:
        """The learning rate at the end of the warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return RELATIVE_RATE if self.relative else ABSOLUTE_RATE

    def total_steps(self, steps_per_epoch: int, shots_per_class: float) -> int:
        """Optimizer steps of a run with `steps_per_epoch`: as set by `max_steps` or `epochs`, else the default."""
        if self.max_steps is not None:
            return self.max_steps
        if self.epochs is not None:
            return self.epochs * steps_per_epoch
        return max(math.ceil(min(STEPS, STEPS_PER_SHOT * shots_per_class)), EPOCHS * steps_per_epoch)

    @property
    def regularizer_options(self) -> dict[str, Any]:
        """The arguments of `fused_regularizers`; a sharpness whose weight is found in every step is measured."""
        options = self.model_dump(include=set(RegularizerOptions.model_fields))
        return {**options, "sharpness": 1.0} if self.sharpness == "auto" else options
