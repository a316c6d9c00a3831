"""The operations as the kernels' tests call them: on one device, with inputs drawn once, and a float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ofa_kernels import reference
from ofa_kernels.ops import contract, displace, norm_step, perturb
from tests.device import DEVICE

EPS = 1e-5


@dataclass(frozen=True)
class Call:
    """One way to call an operation: its kernel, its reference, its inputs, and the names of its outputs."""

    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def run(self, function: Callable[..., Any], *, dtype: torch.dtype | None = None) -> Result:
        """Outputs, and gradients of the inputs for fixed random incoming gradients; optionally of upcast inputs."""
        inputs = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in self.inputs]
        outputs = as_tuple(function(*inputs, **self.settings))
        given = [x for x in inputs if x is not None]
        weights = [weights_like(output, seed=90 + i) for i, output in enumerate(outputs)]
        found = torch.autograd.grad(outputs, given, weights, allow_unused=True)
        return Result(
            dict(zip(self.outputs, (output.detach() for output in outputs), strict=True)),
            [torch.zeros_like(x) if grad is None else grad for x, grad in zip(given, found, strict=True)],
        )


@dataclass(frozen=True)
class Result:
    """A call's outputs, and the gradient of each input."""

    outputs: dict[str, Tensor]
    gradients: list[Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        return self.outputs | {f"gradient {i}": grad for i, grad in enumerate(self.gradients)}


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """An operation's outputs as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def weights_like(output: Tensor, seed: int) -> Tensor:
    """Incoming gradients for an output, with values that are exact in every dtype."""
    return draw(*output.shape, dtype=torch.bfloat16, seed=seed).to(output.dtype)


def scale_and_shift(width: int, dtype: torch.dtype, biased: bool) -> tuple[Tensor, Tensor | None]:
    """γ around 1 and β, or no β."""
    return (1 + 0.3 * draw(width, seed=1)).to(dtype), draw(width, dtype=dtype, seed=2) if biased else None


NORMS = {
    "rms": {"kind": "rms", "offset": 0.0},
    "rms 1+w": {"kind": "rms", "offset": 1.0},
    "layer": {"kind": "layer", "offset": 0.0},
}
PROBE = {"seed": (5 << 32) | 0x90000007, "step": 3}
"""A seed with a high word, and a low word that is negative as a signed number."""


def call(
    operation: str, shape: tuple[int, ...], dtype: torch.dtype, norm: str = "rms", probe: str = "rademacher"
) -> Call:
    """A call of an operation for a stream of this shape; layer norms get a shift."""
    stream, other = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=3)
    stack = draw(2, *shape, dtype=dtype, seed=4)
    scale, shift = scale_and_shift(shape[-1], torch.float32, biased=norm == "layer")
    norms = {"eps": EPS, **NORMS[norm]}
    probes = {**PROBE, "probe": probe}
    if operation == "norm_step":
        names = ("residual", "normalized", "update_sqnorm", "rstd")
        return Call(norm_step.norm_step, reference.norm_step, (stream, other, scale, shift), names, norms)
    if operation == "norm":
        functions = (_without_update(function) for function in (norm_step.norm_step, reference.norm_step))
        return Call(*functions, (stream, scale, shift), ("normalized", "rstd"), norms)
    if operation == "perturb":
        settings = {**norms, **probes, "samples": 2, "epsilon": 0.1}
        return Call(perturb.perturb, reference.perturb, (stream, scale, shift), ("copies",), settings)
    if operation == "perturb behind":
        settings = {**norms, **probes, "samples": 2, "epsilon": 0.1}
        functions = (_behind(function) for function in (perturb.perturb, reference.perturb))
        return Call(*functions, (stream, scale, shift, other), ("stack",), settings)
    if operation.startswith("displace"):
        other = other[..., :1] if operation == "displace per row" else other
        settings = {**probes, "samples": 2, "epsilon": 0.1}
        return Call(displace.displace, reference.displace, (stream, other), ("copies",), settings)
    if operation == "contract":
        return Call(contract.contract, reference.contract, (stream, stack), ("products", "base_sqnorm"), probes)
    assert operation == "squared_norm"
    return Call(contract.squared_norm, reference.squared_norm, (stream,), ("sqnorm",))


OPERATIONS = (
    "norm_step",
    "norm",
    "perturb",
    "perturb behind",
    "displace",
    "displace per row",
    "contract",
    "squared_norm",
)
NORMED = ("norm_step", "norm", "perturb", "perturb behind")
PROBED = ("perturb", "perturb behind", "displace", "displace per row", "contract")


def _without_update(function: Callable[..., Any]) -> Callable[..., Any]:
    def norm(stream: Tensor, weight: Tensor, bias: Tensor | None, **settings: Any) -> tuple[Tensor, Tensor]:
        _, normalized, _, rstd = function(stream, None, weight, bias, **settings)
        return normalized, rstd

    return norm


def _behind(function: Callable[..., Any]) -> Callable[..., Any]:
    def stack(stream: Tensor, weight: Tensor, bias: Tensor | None, unperturbed: Tensor, **settings: Any) -> Tensor:
        return function(stream, weight, bias, unperturbed=unperturbed, **settings)  # type: ignore[no-any-return]

    return stack
