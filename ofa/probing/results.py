"""Results of a probe: readouts of hidden states by layer, step lengths and sharpness, and their curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ofa.evaluation.scorer import Mode
from ofa.regularizers import objectives


@dataclass(frozen=True)
class Readout:
    """Label predictions for every text after every decoder layer.

    `log_probabilities` is (L, n, number of labels), normalized over the labels; `truth` (n,) is the true label's index.

    Example:
        >>> task = ofa.Task("mood", "Review: {text}\\nSentiment:", ("bad", "good"))
        >>> found = ofa.probe(model, tokenizer, task, [("a joy", "good"), ("a bore", "bad")])
        >>> found.lens.accuracy.shape, found.lens.loss.shape  # one number per layer
        (torch.Size([3]), torch.Size([3]))
    """

    log_probabilities: Tensor
    truth: Tensor

    @property
    def correct(self) -> Tensor:
        """1 if the most probable label is the true one, else 0; (L, n), float32."""
        return (self.log_probabilities.argmax(2) == self.truth).float()

    @property
    def losses(self) -> Tensor:
        """−log p(true label) in nats, (L, n)."""
        return -self.log_probabilities.gather(2, self.truth.expand(len(self.log_probabilities), -1)[..., None])[..., 0]

    @property
    def accuracy(self) -> Tensor:
        """Share of correct predictions after every layer, (L,)."""
        return self.correct.mean(1)

    @property
    def loss(self) -> Tensor:
        """Mean cross-entropy over the labels after every layer, in nats, (L,)."""
        return self.losses.mean(1)


@dataclass(frozen=True)
class Steps:
    """The steps of the descent on every prompt.

    `layers` (from 0) and `branches` name the T steps; `estimator` measured the traces. `norms` and `traces` are (T, n),
    `ratios` (T − 1, n) starts at the second step; see `regularizers.objectives.Measurements`.

    Example:
        >>> task = ofa.Task("mood", "Review: {text}\\nSentiment:", ("bad", "good"))
        >>> found = ofa.probe(model, tokenizer, task, [("a joy", "good"), ("a bore", "bad")])
        >>> steps = found.steps["sublayer"]
        >>> steps.branches[:2], steps.estimator, steps.traces.shape
        (('attention', 'mlp'), 'exact', torch.Size([6, 2]))
    """

    layers: tuple[int, ...]
    branches: tuple[str, ...]
    estimator: str
    norms: Tensor
    ratios: Tensor
    traces: Tensor

    @property
    def step_ratio(self) -> float:
        """J, mean over the prompts."""
        return float(objectives.step_ratio(self.ratios))

    @property
    def sharpness(self) -> float:
        """H, mean over the prompts."""
        return float(objectives.sharpness(self.traces))


@dataclass(frozen=True)
class Value:
    """One point of a figure: a mean over the texts and its standard error (None for a single text).

    `step` and `layer` count from 1; `branch` is "layer" for values of a whole decoder layer.

    Example:
        >>> task = ofa.Task("mood", "Review: {text}\\nSentiment:", ("bad", "good"))
        >>> found = ofa.probe(model, tokenizer, task, [("a joy", "good"), ("a bore", "bad")])
        >>> value = found.values()[0]
        >>> value.metric, value.layer, value.branch
        ('lens_accuracy', 1, 'layer')
    """

    granularity: str
    step: int
    layer: int
    branch: str
    metric: str
    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Probe:
    """Everything measured on one model, on the CPU, in float32; the keys of `steps` are granularities.

    `mode` is the part of a label that the lens scores; `truncated` counts the texts cut to fit the window.

    Example:
        >>> task = ofa.Task("mood", "Review: {text}\\nSentiment:", ("bad", "good"))
        >>> found = ofa.probe(model, tokenizer, task, [("a joy", "good"), ("a bore", "bad")])
        >>> sorted({value.metric for value in found.values()})
        ['lens_accuracy', 'lens_loss', 'step_norm', 'step_ratio', 'trace']
    """

    lens: Readout
    linear: Readout | None
    steps: Mapping[str, Steps]
    mode: Mode
    truncated: int
    seconds: float

    def values(self) -> list[Value]:
        """All curves in long form, ordered by metric and then by step."""
        readouts = [("lens", self.lens), *([("linear", self.linear)] if self.linear else [])]
        curves = [
            value
            for name, readout in readouts
            for metric, samples in (("accuracy", readout.correct), ("loss", readout.losses))
            for value in _curve("layer", f"{name}_{metric}", samples, range(len(samples)), ["layer"] * len(samples))
        ]
        for granularity, steps in self.steps.items():
            for metric, samples in (("step_norm", steps.norms), ("step_ratio", steps.ratios), ("trace", steps.traces)):
                curves += _curve(granularity, metric, samples, steps.layers, steps.branches)
        return curves


def _curve(
    granularity: str, metric: str, samples: Tensor, layers: Sequence[int], branches: Sequence[str]
) -> list[Value]:
    """The points of samples (T or T − 1, n); T − 1 samples start at the second step."""
    first = len(layers) - len(samples)
    count = samples.shape[1]
    means = samples.mean(1).tolist()
    errors = (samples.std(1) / count**0.5).tolist() if count > 1 else [None] * len(means)
    points = enumerate(zip(means, errors, strict=True), start=first)
    return [
        Value(granularity, step + 1, layers[step] + 1, branches[step], metric, value, error)
        for step, (value, error) in points
    ]
