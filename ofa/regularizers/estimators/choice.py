"""Chooses an estimator by name, or by what the model's branches allow."""

from __future__ import annotations

import logging

from torch import nn

from ofa.anatomy.steps import Anatomy
from ofa.errors import InputError
from ofa.regularizers.closed_form.modules import NoClosedForm
from ofa.regularizers.estimators import TraceEstimator
from ofa.regularizers.estimators.exact import Exact
from ofa.regularizers.estimators.hutchinson import FullHutchinson, Hutchinson, epsilon_scales
from ofa.regularizers.options import RegularizerOptions

# The package's logger, which users filter by, not this module's.
_logger = logging.getLogger("ofa.regularizers")


def choose(options: RegularizerOptions, model: nn.Module, anatomy: Anatomy) -> TraceEstimator:
    """The estimator that the options name, not attached yet; the choice of "auto" is logged with its reason.

    Raises:
        InputError: "exact" for a model without a closed form.
    """
    name = options.estimator
    if name == "hutchinson":
        return _differences(options, model, anatomy)
    try:
        chosen = Exact(model, anatomy, options.granularity, options.radial, full=options.gradient == "full")
    except NoClosedForm as reason:
        if name == "exact":
            raise InputError(
                f"estimator='exact' has no closed form for this {anatomy.model_type} model, because {reason}; use "
                "estimator='hutchinson'"
            ) from None
        _logger.warning(
            "estimator='auto' chose hutchinson with %d probe(s) for a %s model, because %s",
            options.samples,
            anatomy.model_type,
            str(reason),  # not the exception: its frames would keep the model alive in the log record
        )
        return _differences(options, model, anatomy)
    _logger.info("estimator=%r chose exact for a %s model", name, anatomy.model_type)
    return chosen


def _differences(options: RegularizerOptions, model: nn.Module, anatomy: Anatomy) -> TraceEstimator:
    steps = anatomy.steps(options.granularity)
    scales = epsilon_scales(model, steps) if options.epsilon is None else {}
    kind = FullHutchinson if options.gradient == "full" else Hutchinson
    return kind(options.samples, options.epsilon, options.probe, scales)
