"""The estimator that a model's branches allow."""

from __future__ import annotations

import logging

from torch import nn

from ofa.anatomy import Anatomy
from ofa.closed_form.parts import NoClosedForm
from ofa.errors import InputError
from ofa.estimators import TraceEstimator
from ofa.estimators.exact import Exact
from ofa.estimators.hutchinson import Hutchinson, reaches_of
from ofa.estimators.jvp import ForwardMode
from ofa.estimators.local import LocalForwardMode

ESTIMATORS = ("auto", "exact", "hutchinson", "jvp", "local_jvp")
CLOSED_FORM = ("exact", "local_jvp")
"""Estimators that must know the inside of every branch."""

# The name that people filter by: the choice is made where regularizers are attached.
_logger = logging.getLogger("ofa.regularizers")


def choose(
    name: str,
    model: nn.Module,
    anatomy: Anatomy,
    granularity: str,
    samples: int,
    epsilon: float | None,
    probe: str,
) -> TraceEstimator:
    """The estimator of a name among `ESTIMATORS`, not attached yet; what "auto" chose, and why, is logged.

    Raises:
        InputError: an estimator that must know the inside of every branch, and does not.
    """
    if name == "jvp":
        return ForwardMode(samples, probe)
    if name == "hutchinson":
        return _differences(model, anatomy, granularity, samples, epsilon, probe)
    try:
        if name == "local_jvp":
            return LocalForwardMode(model, anatomy, granularity, samples, probe)
        chosen = Exact(model, anatomy, granularity)
    except NoClosedForm as reason:
        if name in CLOSED_FORM:
            raise InputError(
                f"estimator={name!r} does not know the inside of this {anatomy.model_type} model, because {reason}; "
                "use estimator='hutchinson' or 'jvp'"
            ) from None
        _logger.warning(
            "estimator='auto' chose hutchinson with %d probe(s) for a %s model, because %s",
            samples,
            anatomy.model_type,
            str(reason),  # not the exception: whoever keeps the record would keep the model
        )
        return _differences(model, anatomy, granularity, samples, epsilon, probe)
    _logger.info("estimator=%r chose exact for a %s model", name, anatomy.model_type)
    return chosen


def _differences(
    model: nn.Module,
    anatomy: Anatomy,
    granularity: str,
    samples: int,
    epsilon: float | None,
    probe: str,
) -> Hutchinson:
    norms = (norm.path for norm in anatomy.norms)
    reach = reaches_of(model, norms, anatomy.steps(granularity)) if epsilon is None else {}
    return Hutchinson(samples, epsilon, probe, reach)
