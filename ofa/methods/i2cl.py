"""I2CL: demonstrations as one vector per branch, mixed into every token by calibrated coefficients (arXiv 2405.14660).

Each demonstration is run alone. The context vectors v are the outputs of the attention and MLP branches of all L layers
at its last token (the line end after the label), averaged over the demonstrations. At test, every branch output `out`
becomes β·out + λ·v at every position. The 4L coefficients are calibrated by cross-entropy on the demonstrations'
prompts, with noise 0.001·‖out‖·N(0, I), where ‖out‖ is the norm of each token, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ofa import anatomy
from ofa.anatomy.module_io import hidden_output, replace_hidden_output
from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder
from ofa.evaluation.scorer import Scorer
from ofa.methods import Predictor
from ofa.methods.last_token import last_token_outputs
from ofa.methods.options import special_case
from ofa.models.types import CausalLM, Tokenizer
from ofa.tasks.task import Example, Task
from ofa.training.config import TrainingConfig
from ofa.training.loop import train
from ofa.training.records import StepRecord, TrainingResult

SETTINGS = {"learning_rate": 0.01, "relative": False, "epochs": 100, "batch_size": 2}
"""Defaults that differ from `TrainingConfig`."""

LAMBDA, BETA = 0.1, 1.0
"""The initial coefficients."""

NOISE = 1e-3


@dataclass(frozen=True, kw_only=True)
class ContextPredictor(Predictor):
    """A model with context vectors mixed into its branches until it is closed."""

    mixture: Mixture

    @property
    def coefficients(self) -> Tensor:
        """λ and β (2L, 2) of the branches in model order, float32, on the CPU."""
        return self.mixture.coefficients


def fit(
    model: CausalLM,
    tokenizer: Tokenizer,
    task: Task,
    shots: Sequence[Example],
    seed: int,
    *,
    validation: Sequence[Example] = (),
    progress: Callable[[StepRecord, int], None] | None = None,
    **settings: Any,
) -> ContextPredictor:
    """Compute the vectors of the shots and calibrate the coefficients; `settings` are fields of `TrainingConfig`.

    With `validation` examples, the coefficients of the epoch with the best accuracy on them are kept. The notes hold
    the coefficients. A failed or interrupted run restores the model.

    Raises:
        InputError: a setting is wrong, no demonstration fits the window, or the model's branches are not recognized;
            see also `training.loop.train`.
    """
    settings = special_case("i2cl", {**SETTINGS, **settings}, step_ratio=0.0, sharpness=0.0)
    config = TrainingConfig(seed=seed, **settings)
    scorer = Scorer(model, tokenizer, task)
    mixture = Mixture(model, context_vectors(model, scorer.encoder, shots))
    mixture.attach()
    try:
        with _frozen(model), mixture.calibrating(config.seed) as coefficients:
            result = train(
                model,
                scorer.encoder,
                shots,
                config,
                validate=(lambda: scorer.accuracy(validation)) if validation else None,
                progress=progress,
                tune=lambda model: coefficients,
            )
    except BaseException:
        mixture.detach()
        raise
    return _predictor(scorer, mixture, result)


def transfer(
    model: CausalLM, tokenizer: Tokenizer, task: Task, shots: Sequence[Example], coefficients: Tensor
) -> ContextPredictor:
    """Use the vectors of the shots with coefficients (2L, 2) calibrated on another task; nothing is trained.

    Raises:
        InputError: the coefficients do not fit the model; see also `fit`.
    """
    scorer = Scorer(model, tokenizer, task)
    mixture = Mixture(model, context_vectors(model, scorer.encoder, shots))
    mixture.set(coefficients)
    mixture.attach()
    return _predictor(scorer, mixture, None)


def recompute(predictor: ContextPredictor, examples: Sequence[Example]) -> None:
    """Replace the vectors by those of other demonstrations; the coefficients stay.

    Raises:
        InputError: the predictor is closed, or no demonstration fits the window.
    """
    scorer, mixture = predictor.scorer, predictor.mixture
    if not mixture.attached:
        raise InputError("the predictor is closed, so its demonstrations cannot change: call fit or transfer again")
    mixture.detach()
    try:
        mixture.vectors = context_vectors(scorer.model, scorer.encoder, examples)
    finally:
        mixture.attach()


def similarity(first: Tensor, second: Tensor) -> float:
    """Cosine between the flattened coefficients of two tasks, a measure of the tasks' similarity to the model.

    Raises:
        InputError: they are of different models.
    """
    if first.shape != second.shape:
        raise InputError(
            f"coefficients {tuple(first.shape)} and {tuple(second.shape)} are of different models: compare two tasks "
            "on the same one"
        )
    return float(torch.nn.functional.cosine_similarity(first.double().flatten(), second.double().flatten(), dim=0))


def context_vectors(model: CausalLM, encoder: Encoder, examples: Sequence[Example]) -> list[Tensor]:
    """Mean over the demonstrations, each run alone, of each branch's output (d,) at the last token.

    Demonstrations that do not fit the window are left out.

    Raises:
        InputError: none fits.
    """
    exits = _exits(model)
    demonstrations = [ids for example in examples if (ids := encoder.encode_demonstrations([example]))]
    if not demonstrations:
        raise InputError("no demonstration fits the window: give at least one, or shorter ones")
    outputs = [last_token_outputs(model, exits, ids) for ids in demonstrations]
    return [torch.stack(own).mean(0) for own in zip(*outputs, strict=True)]


class Mixture:
    """Replaces every branch output of a model by β·out + λ·v while attached."""

    def __init__(self, model: CausalLM, vectors: list[Tensor]) -> None:
        self.vectors = vectors
        self._branches = [model.get_submodule(path) for path in _exits(model)]
        device = next(model.parameters()).device
        self._lambda = nn.Parameter(torch.full((len(vectors),), LAMBDA, device=device), requires_grad=False)
        self._beta = nn.Parameter(torch.full((len(vectors),), BETA, device=device), requires_grad=False)
        self._noise: _Noise | None = None
        self._handles: list[RemovableHandle] = []

    @property
    def coefficients(self) -> Tensor:
        """A copy of λ and β (2L, 2), float32, on the CPU."""
        return torch.stack([self._lambda, self._beta], dim=1).detach().cpu()

    @torch.no_grad()
    def set(self, coefficients: Tensor) -> None:
        """Set λ and β (2L, 2). Raises InputError if their number does not fit the model."""
        if coefficients.shape != (len(self.vectors), 2):
            raise InputError(
                f"coefficients {tuple(coefficients.shape)} do not fit a model with {len(self.vectors)} branches: "
                "use those of the same model"
            )
        self._lambda.copy_(coefficients[:, 0])
        self._beta.copy_(coefficients[:, 1])

    @property
    def attached(self) -> bool:
        """True while the hooks are registered."""
        return bool(self._handles)

    def attach(self) -> None:
        """Register the hooks."""
        self._handles = [branch.register_forward_hook(self._hook(i)) for i, branch in enumerate(self._branches)]

    def detach(self) -> None:
        """Remove the hooks, if any."""
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def calibrating(self, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        """The coefficients by name, trainable; forwards with gradients add noise drawn by `seed`."""
        self._noise = _Noise(seed)
        try:
            for parameter in (self._lambda, self._beta):
                parameter.requires_grad_(True)
            yield {"lambda": self._lambda, "beta": self._beta}
        finally:
            self._noise = None
            for parameter in (self._lambda, self._beta):
                parameter.requires_grad_(False).grad = None

    def _hook(self, index: int) -> Callable[..., object]:
        def mix(module: nn.Module, args: object, output: Any) -> object:
            out = hidden_output(output)
            weight, share = self._lambda[index].to(out.device), self._beta[index].to(out.device)
            mixed = share * out + weight * self.vectors[index]
            if self._noise is not None and torch.is_grad_enabled():
                mixed = mixed + NOISE * out.detach().norm(dim=-1, keepdim=True) * self._noise.like(out)
            return replace_hidden_output(output, mixed, lambda other: other)

        return mix


class _Noise:
    """Standard normal noise from generators of its own, independent of other random draws."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def like(self, tensor: Tensor) -> Tensor:
        device = tensor.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return torch.randn(tensor.shape, generator=self._generators[device], dtype=tensor.dtype, device=device)


def _exits(model: CausalLM) -> list[str]:
    branches = [branch for step in anatomy.find(model).steps() for branch in step.branches]
    if any(branch.writes != "update" for branch in branches):
        raise InputError(
            "i2cl needs the branches' outputs, but this model's branches add to the residual stream; choose another "
            "method"
        )
    return [branch.exit for branch in branches]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _predictor(scorer: Scorer, mixture: Mixture, training: TrainingResult | None) -> ContextPredictor:
    coefficients = mixture.coefficients
    return ContextPredictor(
        scorer,
        mixture.detach,
        trainable_parameters=coefficients.numel() if training else 0,
        training=training,
        contexts=("prompt",),
        stored_bytes=coefficients.nbytes + sum(vector.nbytes for vector in mixture.vectors),
        notes={"lambda": coefficients[:, 0].tolist(), "beta": coefficients[:, 1].tolist()},
        mixture=mixture,
    )
