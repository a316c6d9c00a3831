"""A temperature and a prior change probabilities as their papers say."""

from __future__ import annotations

import pytest
import torch

from ofa.errors import InputError
from ofa.evaluation.calibration import Calibration, best_temperature, calibration_from
from ofa.evaluation.scores import metrics


def test_the_temperature_that_made_overconfident_scores_is_found():
    """Labels drawn from the softmax of scores, which are then three times as large: T = 3, to 3 standard errors."""
    generator = torch.Generator().manual_seed(0)
    honest = torch.randn(4000, 3, generator=generator) * 2
    true = torch.multinomial(honest.softmax(1), 1, generator=generator)[:, 0]
    assert best_temperature((3 * honest).log_softmax(1), true) == pytest.approx(3, rel=0.1)


def test_few_texts_that_are_all_right_do_not_ask_for_certainty():
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).log_softmax(1)
    assert best_temperature(scores, torch.tensor([0, 1])) == 1


def test_a_prior_divides_and_a_temperature_keeps_the_order():
    scores = torch.tensor([[0.7, 0.2, 0.1]]).log()
    prior = tuple(torch.tensor([0.5, 0.25, 0.25]).log().tolist())
    divided = torch.tensor([[1.4, 0.8, 0.4]]) / 2.6
    torch.testing.assert_close(Calibration(prior=prior).apply(scores).exp(), divided)
    warmed = Calibration(2.0).apply(scores).exp()
    torch.testing.assert_close(warmed, scores.exp().sqrt() / scores.exp().sqrt().sum())


def test_it_survives_its_file_and_a_broken_one_is_refused():
    kept = Calibration(1.5, (-0.5, -1.0), held_out=10, folds=5)
    assert calibration_from({"calibration": kept.to_dict()}, ("a", "b")) == kept
    assert calibration_from({}, ("a", "b")) is None
    for broken in ({"temperature": 0.0}, {"prior": [0.0]}, {"colour": 1}):
        with pytest.raises(InputError, match="cannot be used; delete it"):
            calibration_from({"calibration": {**kept.to_dict(), **broken}}, ("a", "b"))


def test_brier_score_by_hand():
    """((1−0.7)² + 0.3²  +  0.6² + (1−0.4)²) / 2."""
    found = metrics(torch.tensor([[0.7, 0.3], [0.6, 0.4]]), ["a", "b"], ("a", "b"))
    assert found.brier_score == pytest.approx((0.09 + 0.09 + 0.36 + 0.36) / 2)
