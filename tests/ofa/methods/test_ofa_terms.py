"""OFA with a single term equals OFA with the other weight at 0."""

from __future__ import annotations

import pytest

from ofa.errors import InputError
from ofa.methods import method
from tests.ofa.given_back import SHOTS, TASK

QUICK = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2}
OTHER = {"ofa-step-ratio": "sharpness", "ofa-sharpness": "step_ratio"}
OWN = {"ofa-step-ratio": "step_ratio", "ofa-sharpness": "sharpness"}
WEIGHTS = {"step_ratio": 1e-2, "sharpness": 0.1}


def records(loaded, name, **options):
    with method(name)(*loaded, TASK, SHOTS, 5, **QUICK, **options) as predictor:
        return [(r.loss, r.step_ratio, r.sharpness, r.penalty) for r in predictor.training.records]


@pytest.mark.parametrize("name", OTHER)
def test_one_term_is_ofa_with_the_other_weight_at_0(tiny_model, name):
    """Bit-identical; its own weight is the default or the given one."""
    expected = records(tiny_model, "ofa", **{OWN[name]: WEIGHTS[OWN[name]], OTHER[name]: 0.0})
    assert records(tiny_model, name) == expected
    assert records(tiny_model, name, **{OTHER[name]: 0, OWN[name]: WEIGHTS[OWN[name]]}) == expected
    for _, step_ratio, sharpness, penalty in expected:
        measured = {"step_ratio": step_ratio, "sharpness": sharpness}
        assert measured[OTHER[name]] is None
        assert penalty == pytest.approx(WEIGHTS[OWN[name]] * measured[OWN[name]], rel=1e-6)
    assert records(tiny_model, name, **{OWN[name]: 3.0}) != expected


@pytest.mark.parametrize("name", OTHER)
def test_options_that_contradict_are_refused(tiny_model, name):
    """Otherwise a row of a table would not match its name."""
    with pytest.raises(InputError, match=f"{name} means {OTHER[name]}=0.0, not 0.5"):
        method(name)(*tiny_model, TASK, SHOTS, 5, **{OTHER[name]: 0.5})
    with pytest.raises(InputError, match=f"{name} with {OWN[name]}=0 is norm tuning"):
        method(name)(*tiny_model, TASK, SHOTS, 5, **{OWN[name]: 0.0})
