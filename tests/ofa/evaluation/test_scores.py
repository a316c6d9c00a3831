"""Metrics against numbers computed by hand and independent loops."""

from __future__ import annotations

import json
import math

import pytest
import torch

from ofa.errors import InputError
from ofa.evaluation.scores import metrics


def one_hot_ish(predictions, labels, confidence=0.7):
    rest = (1 - confidence) / (len(labels) - 1)
    return torch.tensor([[confidence if label == predicted else rest for label in labels] for predicted in predictions])


def test_metrics_against_numbers_computed_by_hand():
    # truth a a a b b c, predicted a a b b c c:
    # a: precision 2/2, recall 2/3, F1 4/5; b: 1/2, 1/2, 1/2; c: 1/2, 1/1, 2/3.
    result = metrics(one_hot_ish("aabbcc", "abc"), list("aaabbc"), ("a", "b", "c"))
    assert result.accuracy == pytest.approx(4 / 6)
    assert result.confusion == ((2, 1, 0), (0, 1, 1), (0, 0, 1))
    assert [row.precision for row in result.per_class] == pytest.approx([1, 1 / 2, 1 / 2])
    assert [row.recall for row in result.per_class] == pytest.approx([2 / 3, 1 / 2, 1])
    assert [row.f1 for row in result.per_class] == pytest.approx([4 / 5, 1 / 2, 2 / 3])
    assert [row.support for row in result.per_class] == [3, 2, 1]
    assert result.macro_f1 == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)
    # All confidences are 0.7, in one bin.
    assert result.expected_calibration_error == pytest.approx(0.7 - 4 / 6)
    assert result.count == 6
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


@pytest.mark.parametrize(
    ("truth", "predicted", "expected"),
    [
        ("aabb", "aabb", 1.0),  # c is in neither: it has no F1 and is left out
        ("aabb", "aabc", (1 + 2 / 3 + 0) / 3),  # c is predicted but never true: F1 0
        ("aabc", "aabb", (1 + 2 / 3 + 0) / 3),  # c is true but never predicted: F1 0
        ("cc", "ab", 0.0),
    ],
)
def test_macro_f1_with_an_absent_class(truth, predicted, expected):
    result = metrics(one_hot_ish(predicted, "abc"), list(truth), tuple("abc"))
    assert result.macro_f1 == pytest.approx(expected)


def oracle_calibration_error(confidences, correct):
    total = 0.0
    for index in range(15):
        inside = [i for i, value in enumerate(confidences) if index / 15 < value <= (index + 1) / 15]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            total += len(inside) / len(confidences) * abs(accuracy - sum(confidences[i] for i in inside) / len(inside))
    return total


def test_calibration_error_by_hand():
    # Two bins: 0.9, 0.92 (one right), and 0.6 (right): (2/3)·|0.5 − 0.91| + (1/3)·|1 − 0.6|.
    probabilities = torch.tensor([[0.9, 0.1], [0.08, 0.92], [0.6, 0.4]])
    result = metrics(probabilities, ["a", "a", "a"], ("a", "b"))
    assert result.expected_calibration_error == pytest.approx(2 / 3 * 0.41 + 1 / 3 * 0.4, abs=1e-6)
    certain = metrics(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), ["a", "a"], ("a", "b"))
    assert certain.expected_calibration_error == pytest.approx(0.5)


def test_negative_log_likelihood_by_hand():
    """The mean of −ln p(true label); a probability that underflowed to 0 counts as the smallest of float32."""
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [1.0, 0.0]])
    result = metrics(probabilities[:2], ["a", "a"], ("a", "b"))
    assert result.negative_log_likelihood == pytest.approx(-(math.log(0.9) + math.log(0.2)) / 2, rel=1e-6)
    impossible = metrics(probabilities[2:], ["b"], ("a", "b"))
    assert impossible.negative_log_likelihood == pytest.approx(126 * math.log(2))


@pytest.mark.parametrize("seed", range(5))
def test_metrics_against_independent_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = tuple("abcde")
    # Float64, so that no confidence is rounded over the border of a bin.
    probabilities = (torch.randn(200, 5, generator=generator, dtype=torch.float64) * 2).softmax(1)
    truth = [labels[i] for i in torch.randint(0, 5, (200,), generator=generator).tolist()]
    predicted = [labels[row.index(max(row))] for row in probabilities.tolist()]
    result = metrics(probabilities, truth, labels)
    pairs = list(zip(truth, predicted, strict=True))
    assert result.confusion == tuple(tuple(pairs.count((true, guess)) for guess in labels) for true in labels)
    scores = []
    for label in labels:
        both = pairs.count((label, label))
        precision, recall = both / predicted.count(label), both / truth.count(label)
        scores.append(2 * precision * recall / (precision + recall) if both else 0.0)
    assert result.macro_f1 == pytest.approx(math.fsum(scores) / 5)
    correct = [true == guess for true, guess in pairs]
    confidences = [max(row) for row in probabilities.tolist()]
    assert result.expected_calibration_error == pytest.approx(oracle_calibration_error(confidences, correct))


@pytest.mark.parametrize(
    ("probabilities", "truth", "message"),
    [
        (torch.empty(0, 2), [], "there are no examples"),
        (torch.ones(1, 3), ["a"], "one column for each of the 2 labels"),
        (torch.ones(1, 2), ["c"], "the label 'c' of an example"),
        (torch.tensor([[float("nan"), 1.0]]), ["a"], "not numbers"),
    ],
)
def test_probabilities_that_cannot_be_measured_are_refused(probabilities, truth, message):
    with pytest.raises(InputError, match=message):
        metrics(probabilities, truth, ("a", "b"))
