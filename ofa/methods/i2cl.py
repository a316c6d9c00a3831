"""I2CL: demonstrations as one vector per branch, mixed into every token by calibrated coefficients (arXiv 2405.14660).

Each demonstration is run alone. The context vectors v are the outputs of the attention and MLP branches of all L layers
at its last token (the line end after the label), averaged over the demonstrations. At test, every branch output `out`
becomes β·out + λ·v at every position. The 4L coefficients are calibrated by cross-entropy on the demonstrations'
prompts, with noise 0.001·‖out‖·N(0, I), where ‖out‖ is the norm of each token, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from ofa.models.introspection import frozen
from ofa.models.types import CausalLM, Tokenizer
from ofa.tasks.task import Example, Task
from ofa.training.config import TrainingConfig
from ofa.training.loop import train
from ofa.training.records import StepRecord

SETTINGS = {"learning_rate": 0.01, "relative": False, "epochs": 100, "batch_size": 2}
"""Defaults that differ from `TrainingConfig`."""

LAMBDA, BETA = 0.1, 1.0
"""The initial coefficients."""

NOISE = 1e-3


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
) -> Predictor:
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
        with frozen(model), mixture.calibrating(config.seed) as parameters:
            result = train(
                model,
                scorer.encoder,
                shots,
                config,
                validate=(lambda: scorer.accuracy(validation)) if validation else None,
                progress=progress,
                tune=lambda model: parameters,
            )
    except BaseException:
        mixture.detach()
        raise
    coefficients = mixture.coefficients
    return Predictor(
        scorer,
        mixture.detach,
        trainable_parameters=coefficients.numel(),
        training=result,
        contexts=("prompt",),
        stored_bytes=coefficients.nbytes + sum(vector.nbytes for vector in mixture.vectors),
        notes={"lambda": coefficients[:, 0].tolist(), "beta": coefficients[:, 1].tolist()},
    )


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
