"""Metrics of label probabilities: accuracy, macro-F1, confusion, calibration. Pure functions, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ofa.errors import InputError

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class ClassMetrics:
    """Precision, recall and F1 of one class (0 where undefined); `support` is its number of true examples."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Metrics:
    """Quality of label predictions.

    `confusion[i][j]` counts the examples of label i predicted as label j. `negative_log_likelihood` is the mean of
    −ln p(true label), `brier_score` that of Σ (p − 1[label is true])² over the labels. `macro_f1` is the mean F1 of the
    classes that occur in the truth or in the predictions.

    Example:
        >>> task = ofa.Task("mood", "Review: {text}\\nSentiment:", ("bad", "good"))
        >>> metrics = ofa.evaluate(model, tokenizer, task, [("a joy", "good"), ("a bore", "bad")]).metrics
        >>> 0 <= metrics.accuracy <= 1, metrics.to_dict()["labels"]
        (True, ['bad', 'good'])
    """

    accuracy: float
    macro_f1: float
    negative_log_likelihood: float
    confusion: tuple[tuple[int, ...], ...]
    expected_calibration_error: float
    brier_score: float
    count: int
    labels: tuple[str, ...]
    per_class: tuple[ClassMetrics, ...]

    def to_dict(self) -> dict[str, object]:
        """The metrics as JSON values."""
        return {
            **asdict(self),
            "confusion": [list(row) for row in self.confusion],
            "labels": list(self.labels),
            "per_class": [asdict(row) for row in self.per_class],
        }


@dataclass(frozen=True)
class CompletionMetrics:
    """Quality of completions of an open-ended task: share of exact matches, mean negative log-likelihood per token.

    Example:
        >>> sums = ofa.Task("sums")  # no labels: open-ended
        >>> metrics = ofa.evaluate(model, tokenizer, sums, [{"prompt": "12 + 7 is", "completion": " 19"}]).metrics
        >>> sorted(metrics.to_dict())
        ['count', 'exact_match', 'negative_log_likelihood']
    """

    exact_match: float
    negative_log_likelihood: float
    count: int

    @property
    def accuracy(self) -> float:
        """`exact_match`, under the name that label tasks use."""
        return self.exact_match

    def to_dict(self) -> dict[str, object]:
        """The metrics as JSON values."""
        return asdict(self)


def metrics(probabilities: Tensor, truth: Sequence[str], labels: Sequence[str]) -> Metrics:
    """Metrics of `probabilities` (n, number of labels), whose columns are in the order of `labels`.

    Raises InputError for no examples, sizes that differ, a true label outside `labels`, or probabilities not finite.
    """
    _check(probabilities, truth, labels)
    true = torch.tensor([list(labels).index(label) for label in truth])
    probabilities = probabilities.detach().to("cpu", torch.float64)
    confidence, predicted = probabilities.max(dim=1)
    size = len(labels)
    confusion = torch.bincount(true * size + predicted, minlength=size * size).reshape(size, size)
    per_class = tuple(_class_metrics(label, confusion, index) for index, label in enumerate(labels))
    occurs = (confusion.sum(0) + confusion.sum(1) > 0).tolist()
    scores = [row.f1 for row, seen in zip(per_class, occurs, strict=True) if seen]
    return Metrics(
        accuracy=int(confusion.diagonal().sum()) / len(truth),
        macro_f1=sum(scores) / len(scores),
        negative_log_likelihood=_negative_log_likelihood(probabilities, true),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        brier_score=float((probabilities - one_hot(true, size)).square().sum(1).mean()),
        expected_calibration_error=_calibration_error(confidence, true == predicted),
        count=len(truth),
        labels=tuple(labels),
        per_class=per_class,
    )


def _check(probabilities: Tensor, truth: Sequence[str], labels: Sequence[str]) -> None:
    if not truth:
        raise InputError("there are no examples to measure: give at least one")
    if probabilities.shape != (len(truth), len(labels)):
        raise InputError(
            f"the probabilities have shape {tuple(probabilities.shape)}: give one row for each of the {len(truth)} "
            f"examples and one column for each of the {len(labels)} labels"
        )
    unknown = next((label for label in truth if label not in labels), None)
    if unknown is not None:
        raise InputError(f"the label {unknown!r} of an example is not one of the task's: use {', '.join(labels)}")
    if not torch.isfinite(probabilities).all():
        raise InputError(
            "the model's scores are not numbers, because its weights have diverged: train it with a lower learning rate"
        )


def _class_metrics(label: str, confusion: Tensor, index: int) -> ClassMetrics:
    hits = int(confusion[index, index])
    support = int(confusion[index].sum())
    predicted = int(confusion[:, index].sum())
    return ClassMetrics(
        label=label,
        precision=hits / predicted if predicted else 0.0,
        recall=hits / support if support else 0.0,
        f1=2 * hits / (support + predicted) if support + predicted else 0.0,
        support=support,
    )


def _negative_log_likelihood(probabilities: Tensor, true: Tensor) -> float:
    # A float32 probability of 0 stands for anything below the smallest positive one.
    chosen = probabilities.gather(1, true[:, None]).clamp_min(torch.finfo(torch.float32).tiny)
    return float(-chosen.log().mean())


def _calibration_error(confidence: Tensor, correct: Tensor) -> float:
    # Bins are (k/15, (k+1)/15]: a confidence of exactly 1 falls into the last one.
    bins = ((confidence * CALIBRATION_BINS).ceil().long() - 1).clamp(0, CALIBRATION_BINS - 1)
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64)
    gaps.index_add_(0, bins, correct.double() - confidence)
    return float(gaps.abs().sum()) / len(confidence)
