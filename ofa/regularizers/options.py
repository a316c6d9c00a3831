"""The options of `fused_regularizers`, declared once: training settings and the command line take them from here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ofa.errors import InputError

CONVENTIONS = {"theory": -1.0, "algorithm1": 1.0}
"""Sign of h_t relative to the trace tr(J_t P_t): the gradient is −F in the theory and +F in Algorithm 1."""


PAPER: Mapping[str, object] = MappingProxyType(
    {
        "step_ratio": 1e-2,
        "sharpness": 1e-3,
        "estimator": "hutchinson",
        "gradient": "full",
        "granularity": "layer",
        "probe": "gaussian",
        "convention": "algorithm1",
        "tokens": "all",
    }
)
"""Options of `fused_regularizers` for the objective of arXiv 2505.19107, Algorithm 1 as printed: both terms at its
weights, one Gaussian probe per decoder layer, differentiated through everything. ε follows the dtype (1e-3 there)."""


def step_ratio_field(default: float) -> Any:
    """The weight λ₁, whose default differs between the regularizers alone and a training run."""
    told = "Weight λ₁ of the step-ratio term; both weights 0 is plain norm tuning."
    return Field(default=default, ge=0, allow_inf_nan=False, description=told)


class RegularizerOptions(BaseModel):
    """Weights of the two terms, and how they are measured; the descriptions are the command line's help.

    Raises:
        InputError: an option is unknown or out of range.
    """

    model_config = ConfigDict(title="Regularizers", extra="forbid", frozen=True)

    step_ratio: float = step_ratio_field(default=1e-2)
    sharpness: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="Weight λ₂ of the sharpness term.")
    estimator: Literal["auto", "exact", "hutchinson"] = Field(
        default="auto", description="How the trace is measured: auto (exact where possible), exact or hutchinson."
    )
    granularity: Literal["sublayer", "layer"] = Field(
        default="sublayer", description="What a step is: sublayer, or layer as in the paper."
    )
    samples: int = Field(default=1, ge=1, description="Random probes N per step, if probes estimate the trace.")
    epsilon: float | None = Field(
        default=None, gt=0, description="Finite-difference step. Without it each branch has its own, by its dtype."
    )
    probe: Literal["rademacher", "gaussian"] = Field(
        default="rademacher", description="Distribution of the random probes: rademacher or gaussian."
    )
    convention: Literal["theory", "algorithm1"] = Field(
        default="theory", description="Sign of the trace: theory or algorithm1."
    )
    gradient: Literal["preconditioner", "full"] = Field(
        default="preconditioner",
        description="How the sharpness is differentiated: preconditioner (in γ alone), or full as in the paper.",
    )
    every: int = Field(
        default=1,
        ge=1,
        description="Measure the sharpness in one optimizer step of this many; reuse its gradient in the others.",
    )
    radial: Literal["channels", "exact", "none"] = Field(
        default="channels",
        description="Channels of the exact trace's radial terms in training: channels (8), exact (all) or none.",
    )
    tokens: Literal["no-sinks", "all", "last"] = Field(
        default="no-sinks",
        description="Tokens that count for the step ratio: no-sinks (all but attention sinks), all as in the paper, or "
        "last.",
    )
    seed: int = Field(default=0, ge=-(2**63), lt=2**63, description="Seed of the probes.")

    def __init__(self, **options: object) -> None:
        """Check the options."""
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise InputError(_sentence(error)) from error

    @model_validator(mode="after")
    def _check_reuse(self) -> Self:
        if self.every > 1 and self.gradient == "full":
            raise InputError(
                "every > 1 reuses a measured gradient, and gradient='full' keeps none; leave out one of the two"
            )
        return self


def _sentence(error: ValidationError) -> str:
    """The error of the first option that is unknown or out of range."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    name = first["loc"][0]
    if first["type"] == "extra_forbidden":
        return f"there is no setting {name} to be {first['input']!r}"
    if (name, first["input"]) == ("sharpness", "auto"):
        return "sharpness='auto' weighs the term against a training run's loss (ofa.adapt, ofa fit); give a number here"
    must = first["msg"].replace("Input should", "must")
    words = [
        one["ctx"]["expected"] for one in error.errors() if one["type"] == "literal_error" and one["loc"][0] == name
    ]
    if words and first["type"] == "float_parsing":
        must = f"must be a number or {words[0]}"
    return f"{name} {must}, not {first['input']!r}"
