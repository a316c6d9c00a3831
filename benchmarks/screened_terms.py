"""Ways to add a term to the cross-entropy that are not in the program; see `benchmarks.screen`."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import ofa
from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder
from ofa.methods import Predictor
from ofa.methods.norm_tuning import fit_norm_scales
from ofa.models.introspection import evaluating, model_window
from ofa.regularizers.objectives import Measurements
from ofa.regularizers.options import RegularizerOptions
from ofa.tasks import Example, Task
from ofa.training.config import TrainingConfig
from ofa.training.loop import learning_rate
from ofa.training.loss import EncodedExample, cross_entropy, encode_example

WAYS = {
    "": "a fixed weight",
    "× loss": "the weight times the batch's cross-entropy",
    "of the first gradient": "one weight, from the lengths of both gradients over all shots before the first step",
    "of the gradient": "a new weight in every step, from the lengths of both gradients",
    "of the gradient, one-sided": "the same, after its part against the cross-entropy's gradient is taken out",
    "decoupled": "gradient descent after Adam's step; the first moves a channel by this share of Adam's on average",
}
"""What a number before these words means as the weight of a term."""

AGGREGATES = ("mean", "median", "hinge", "log2", "expansion", "kinetic")
"""What is made of the steps of single tokens, instead of the ratio of lengths over all tokens that count.

The first four make J of their ratios, "expansion" is Σ relu(ratio − 1), "kinetic" Σ ‖F‖² relative to its start.
"""

_WEIGHT = re.compile(r"(?P<number>[\d.e+-]+) ?(?P<way>.*)")


@dataclass(frozen=True)
class Term:
    """A regularizer, how its gradient joins the cross-entropy's, and how J is made of the ratios of tokens.

    The name "unified" is for both regularizers, each relative to its value before the first step.
    `permuted` mixes the channels of its gradient, always in the same way: a control of the same size without meaning.
    """

    name: str = "sharpness"
    number: float = 0.0
    way: str = ""
    aggregate: str | None = None
    permuted: bool = False

    @classmethod
    def parse(cls, weight: object, **settings: Any) -> Term:
        """A term from a setting such as 0.1 or "0.3 of the gradient".

        Raises:
            InputError: the words are none of `WAYS`, or there is no such aggregate.
        """
        found = _WEIGHT.fullmatch(str(weight))
        if found is None or found["way"] not in WAYS:
            raise InputError(f'the weight "{weight}" cannot be read: write a number and one of {list(WAYS)}')
        if settings.get("aggregate") not in (None, *AGGREGATES):
            raise InputError(f"aggregate must be one of {', '.join(AGGREGATES)}, not {settings['aggregate']}")
        return cls(number=float(found["number"]), way=found["way"], **settings)


def fit(
    model: Any,
    tokenizer: Any,
    task: Task,
    shots: Sequence[Example],
    seed: int,
    *,
    step_ratio: object = 0.0,
    sharpness: object = 0.0,
    unified: object = 0.0,
    aggregate: str | None = None,
    control: str | None = None,
    batches: str | None = None,
    **settings: Any,
) -> Predictor:
    """Tune the norm scales with at most one term; the notes have both terms and the score on the shots at the end.

    Args:
        step_ratio, sharpness, unified: a number, or one with words of `WAYS`.
        aggregate: one of `AGGREGATES`.
        control: "permuted" mixes the channels of the term's gradient.
        batches: "balanced" draws batches with the classes in turn.
        settings: fields of `TrainingConfig`.
    """
    weights = {"step_ratio": step_ratio, "sharpness": sharpness, "unified": unified}
    given = {name: weight for name, weight in weights.items() if weight} or {"sharpness": 0.0}
    if len(given) > 1:
        raise InputError(f"a screened run has one term, not {' and '.join(given)}")
    ((name, weight),) = given.items()
    term = Term.parse(weight, name=name, aggregate=aggregate, permuted=control == "permuted")
    how = {key: settings.pop(key) for key in list(settings) if key in RegularizerOptions.model_fields}
    config = TrainingConfig(seed=seed, **settings)
    encoder = Encoder(tokenizer, task, model_window(model))
    data = [encode_example(encoder, example) for example in shots]
    order = balanced(shots, config) if batches == "balanced" else None
    guidance = WithTerm(model, term, data, config, order, how, len(task.labels))
    try:
        predictor = fit_norm_scales(model, tokenizer, task, shots, config, guidance=guidance)
    finally:
        guidance.close()
    return replace(predictor, notes={**predictor.notes, "screened": True, **_at_the_end(model, predictor, data, shots)})


class WithTerm:
    """Fills the gradients of a step with the cross-entropy's and the term's."""

    def __init__(
        self,
        model: nn.Module,
        term: Term,
        data: Sequence[EncodedExample],
        config: TrainingConfig,
        order: Callable[[int, int], list[int]] | None,
        how: Mapping[str, Any],
        classes: int,
    ) -> None:
        self._model, self._term, self._data, self._config, self._order, self._how = (
            model,
            term,
            data,
            config,
            order,
            how,
        )
        self._regularizers: Any = None
        self._parameters: list[nn.Parameter] = []
        self._sizes: list[Tensor] = []
        """|γ₀| with relative steps, else 1: the unit in which a gradient's length is measured."""
        self._step = 0
        self._steps_per_epoch = math.ceil(len(data) / config.batch_size)
        self._total = config.total_steps(self._steps_per_epoch, len(data) / classes)
        self._weight = term.number
        self._pretrained: Tensor | None = None
        self._pending: list[Tensor] = []
        self._first_rms = 0.0

    def begin(self, parameters: Sequence[nn.Parameter], losses: object) -> None:
        """Attach the regularizers; measure what is taken from the pretrained model."""
        self._parameters = list(parameters)
        ones = [torch.ones_like(parameter) for parameter in parameters]
        relative = [p.detach().abs().clamp_min(1e-3 * float(p.detach().abs().mean())) for p in parameters]
        self._sizes = relative if self._config.relative else ones
        if not self._term.number:
            return
        measured = {name: float(self._term.name in (name, "unified")) for name in ("step_ratio", "sharpness")}
        self._regularizers = ofa.fused_regularizers(self._model, **measured, seed=self._config.seed, **self._how)
        if self._term.aggregate in ("hinge", "kinetic") or self._term.name == "unified":
            self._pretrained = torch.stack([self._at_the_start() * share for share in self._over_all_shots()]).sum(0)
        if self._term.way == "of the first gradient":
            own, other = self._gradients_over_all_shots()
            self._weight = self._term.number * self._length(own) / self._length(other)

    def backward(self, loss: Callable[[], Tensor]) -> float:
        """Fill the gradients and return the batch's cross-entropy."""
        self._descend()
        if self._order is not None:
            epoch, index = divmod(self._step, self._steps_per_epoch)
            batch = [self._data[i] for i in self._order(epoch, index)]
            loss = lambda: cross_entropy(self._model, batch)  # noqa: E731
        value = loss()
        self._step += 1
        if self._regularizers is None:
            value.backward()
        elif self._term.way in ("", "× loss", "of the first gradient") and not self._term.permuted:
            weight = self._weight * (float(value.detach()) if self._term.way == "× loss" else 1.0)
            (value + weight * self._value()).backward()
        else:
            self._combine(*self._both(value))
        return float(value.detach())

    def close(self) -> None:
        """Detach the regularizers."""
        if self._regularizers is not None:
            self._regularizers.close()

    def _combine(self, own: list[Tensor], other: list[Tensor]) -> None:
        way, number = self._term.way, self._weight
        if way.startswith("of the gradient"):
            if "one-sided" in way:
                inner = sum((a * b * s**2).sum() for a, b, s in zip(own, other, self._sizes, strict=True))
                share = min(0.0, float(inner)) / self._length(own) ** 2
                other = [b - share * a for a, b in zip(own, other, strict=True)]
            number *= self._length(own) / max(self._length(other), 1e-12)
        if way == "decoupled":
            # Its own step follows Adam's: before the next forward pass.
            steps = [size**2 * gradient for size, gradient in zip(self._sizes, other, strict=True)]
            relative = torch.cat([step / size for step, size in zip(steps, self._sizes, strict=True)])
            self._first_rms = self._first_rms or float(relative.square().mean().sqrt())
            rate = learning_rate(self._step - 1, self._total, self._config) * number / self._first_rms
            self._pending = [rate * step for step in steps]
            number = 0.0
        for parameter, a, b in zip(self._parameters, own, other, strict=True):
            parameter.grad = a + number * b

    @torch.no_grad()
    def _descend(self) -> None:
        for parameter, step in zip(self._parameters, self._pending, strict=False):
            parameter.sub_(step)
        self._pending = []

    def _both(self, value: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients of the cross-entropy and of the term, permuted if asked."""
        own = self._gradients(value, retain_graph=True)
        other = self._gradients(self._value())
        if self._term.permuted:
            drawn = torch.Generator().manual_seed(1000 * self._config.seed)
            other = [gradient[torch.randperm(len(gradient), generator=drawn)] for gradient in other]
        return own, other

    def _gradients(self, value: Tensor, **how: Any) -> list[Tensor]:
        found = torch.autograd.grad(value, self._parameters, allow_unused=True, **how)
        return [
            torch.zeros_like(parameter) if one is None else one
            for one, parameter in zip(found, self._parameters, strict=True)
        ]

    def _gradients_over_all_shots(self) -> tuple[list[Tensor], list[Tensor]]:
        sums: list[list[Tensor]] = []
        for share, value in self._losses_over_all_shots():
            parts = self._both(value)
            sums = (
                [[share * one for one in part] for part in parts]
                if not sums
                else [
                    [before + share * one for before, one in zip(total, part, strict=True)]
                    for total, part in zip(sums, parts, strict=True)
                ]
            )
        return sums[0], sums[1]

    def _losses_over_all_shots(self) -> Iterator[tuple[float, Tensor]]:
        size = self._config.batch_size
        for start in range(0, len(self._data), size):
            part = self._data[start : start + size]
            yield len(part) / len(self._data), cross_entropy(self._model, part)

    def _over_all_shots(self) -> Iterator[float]:
        for share, _ in self._losses_over_all_shots():
            yield share

    def _value(self) -> Tensor:
        measured = self._regularizers.measurements
        if self._term.name == "sharpness":
            return measured.sharpness  # type: ignore[no-any-return]
        if self._term.name == "unified":
            assert self._pretrained is not None
            return (torch.stack((measured.step_ratio, measured.sharpness)) / self._pretrained).sum()
        if self._term.aggregate is None:
            return measured.step_ratio  # type: ignore[no-any-return]
        return aggregated(measured, self._term.aggregate, self._pretrained)

    @torch.no_grad()
    def _at_the_start(self) -> Tensor:
        """What the term is set against, from the last pass: J and H, or a value for each step."""
        measured = self._regularizers.measurements
        if self._term.name == "unified":
            return torch.stack((measured.step_ratio, measured.sharpness))
        return token_means(measured, self._term.aggregate)

    def _length(self, gradients: Sequence[Tensor]) -> float:
        parts = [(size * gradient).norm() for size, gradient in zip(self._sizes, gradients, strict=True)]
        return float(torch.stack(parts).norm())


def token_ratios(measured: Measurements) -> tuple[Tensor, Tensor]:
    """Step ratios of every token, (T − 1, B, tokens), 1 where it does not count; the tokens' shares, (B, tokens)."""
    squares, counted = measured.token_squares, measured.counted
    assert squares is not None
    counted = torch.ones_like(squares[0], dtype=torch.bool) if counted is None else counted
    lengths = torch.where(counted, squares, 1.0).clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
    return lengths[1:] / lengths[:-1], counted / counted.sum(1, keepdim=True).clamp_min(1)


def token_means(measured: Measurements, aggregate: str | None) -> Tensor:
    """The mean over tokens and sequences of ‖F‖², (T,), for "kinetic", else of the ratios, (T − 1,); no graph."""
    ratios, shares = token_ratios(measured)
    values = measured.token_squares if aggregate == "kinetic" else ratios
    assert values is not None
    return (values * shares).sum(2).mean(1).detach()


def aggregated(measured: Measurements, aggregate: str, pretrained: Tensor | None = None) -> Tensor:
    """J of the ratios of single tokens: Σ over steps, mean over sequences; `pretrained` has one value for each step."""
    ratios, shares = token_ratios(measured)
    if aggregate == "kinetic":
        assert pretrained is not None
        assert measured.token_squares is not None
        return ((measured.token_squares * shares).sum(2).mean(1) / pretrained).sum()
    if aggregate == "median":
        chosen = ratios.masked_fill(shares == 0, torch.nan).nanmedian(2).values
    else:
        values = ratios
        if aggregate == "log2":
            values = ratios.log().square()
        elif aggregate == "expansion":
            values = torch.relu(ratios - 1)
        elif aggregate == "hinge":
            assert pretrained is not None
            values = torch.relu(ratios / pretrained.view(-1, 1, 1) - 1)
        chosen = (values * shares).sum(2)
    return chosen.sum(0).mean()


def balanced(shots: Sequence[Example], config: TrainingConfig) -> Callable[[int, int], list[int]]:
    """Indices of the batch of an epoch: the loop's own order, with the classes taking turns."""

    def batch(epoch: int, index: int) -> list[int]:
        generator = random.Random(f"{config.seed}/epoch/{epoch}")
        keys = [generator.random() for _ in shots]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        turns: dict[str, int] = {}
        ranks = {}
        for one in order:
            ranks[one] = turns[shots[one].label] = turns.get(shots[one].label, -1) + 1
        order.sort(key=ranks.__getitem__)
        return order[index * config.batch_size : (index + 1) * config.batch_size]

    return batch


def _at_the_end(
    model: Any, predictor: Predictor, data: Sequence[EncodedExample], shots: Sequence[Example]
) -> dict[str, Any]:
    """Both terms on the shots, and the score there."""
    sharpness = step_ratio = 0.0
    with ofa.fused_regularizers(model) as regularizers, torch.no_grad(), regularizers.measuring(), evaluating(model):
        for one in data:
            cross_entropy(model, [one])
            measured = regularizers.measurements
            assert measured.sharpness is not None
            assert measured.step_ratio is not None
            sharpness += float(measured.sharpness) / len(data)
            step_ratio += float(measured.step_ratio) / len(data)
    trained = predictor.evaluate(shots).metrics
    training = {"accuracy": trained.accuracy, "negative_log_likelihood": trained.negative_log_likelihood}
    return {"at_the_end": {"sharpness": sharpness, "step_ratio": step_ratio, "shots": training}}
