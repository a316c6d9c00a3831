"""The options of `fused_regularizers`, checked before anything is loaded or attached."""

from __future__ import annotations

from typing import Any

from ofa import anatomy as anatomies
from ofa.errors import InputError
from ofa.regularizers.closed_form.branch_trace import RADIAL
from ofa.regularizers.estimators.choice import ESTIMATORS, GRADIENTS
from ofa_kernels.philox import PROBES

CONVENTIONS = {"theory": -1.0, "algorithm1": 1.0}
"""Sign of h_t relative to the trace tr(J_t P_t): the gradient is −F in the theory and +F in Algorithm 1."""


TOKENS = ("all", "last")


def check_options(**options: Any) -> None:
    """Refuse options of `fused_regularizers` that are out of range, before anything is loaded or attached.

    Raises:
        InputError: one sentence on the first option that cannot be used.
    """
    for name, allowed in (
        ("estimator", ESTIMATORS),
        ("granularity", anatomies.GRANULARITIES),
        ("probe", PROBES),
        ("convention", tuple(CONVENTIONS)),
        ("tokens", TOKENS),
        ("gradient", GRADIENTS),
        ("radial", RADIAL),
    ):
        if options[name] not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, not {options[name]!r}")
    for name in ("step_ratio", "sharpness"):
        if not 0 <= options[name] < float("inf"):
            raise InputError(f"{name} is a weight and must be a finite number of at least 0, not {options[name]!r}")
    if options["samples"] < 1:
        raise InputError(f"samples must be at least 1, not {options['samples']!r}")
    if options["every"] < 1:
        raise InputError(f"every counts optimizer steps and must be at least 1, not {options['every']!r}")
    if options["every"] > 1 and options["gradient"] == "full":
        raise InputError(
            "every > 1 reuses a measured gradient, and gradient='full' keeps none; leave out one of the two"
        )
    if options["epsilon"] is not None and not options["epsilon"] > 0:
        raise InputError(f"epsilon must be above 0, not {options['epsilon']!r}")
