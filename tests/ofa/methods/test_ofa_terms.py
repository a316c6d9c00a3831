"""OFA with the step ratio alone equals OFA with the weight of the sharpness at 0."""

from __future__ import annotations

import pytest

from ofa.errors import InputError
from ofa.methods import method
from tests.ofa.given_back import SHOTS, TASK

QUICK = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2}
WEIGHT = 1e-2


def records(loaded, name, **options):
    with method(name)(*loaded, TASK, SHOTS, 5, **QUICK, **options) as predictor:
        return [(r.loss, r.step_ratio, r.sharpness, r.penalty) for r in predictor.training.records]


def test_one_term_is_ofa_with_the_other_weight_at_0(tiny_model):
    """Bit-identical; its own weight is the default or the given one."""
    expected = records(tiny_model, "ofa", step_ratio=WEIGHT, sharpness=0.0)
    assert records(tiny_model, "ofa-step-ratio") == expected
    assert records(tiny_model, "ofa-step-ratio", sharpness=0, step_ratio=WEIGHT) == expected
    for _, step_ratio, sharpness, penalty in expected:
        assert sharpness is None
        assert penalty == pytest.approx(WEIGHT * step_ratio, rel=1e-6)
    assert records(tiny_model, "ofa-step-ratio", step_ratio=3.0) != expected


def test_options_that_contradict_are_refused(tiny_model):
    """Otherwise a row of a table would not match its name."""
    with pytest.raises(InputError, match=r"ofa-step-ratio means sharpness=0\.0, not 0\.5"):
        method("ofa-step-ratio")(*tiny_model, TASK, SHOTS, 5, sharpness=0.5)
    with pytest.raises(InputError, match="ofa-step-ratio with step_ratio=0 is norm tuning"):
        method("ofa-step-ratio")(*tiny_model, TASK, SHOTS, 5, step_ratio=0.0)
