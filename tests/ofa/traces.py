"""What tests of estimators share: models that are exact enough, dense traces, and who compares with them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ofa
from ofa_kernels import philox
from tests import families, oracle
from tests.cases import CLOSED
from tests.device import DEVICE

EVERY: dict[str, dict[str, Any]] = {
    "exact": {"estimator": "exact"},
    "exact, full": {"estimator": "exact", "gradient": "full"},
    "hutchinson": {"estimator": "hutchinson"},
    "hutchinson, full": {"estimator": "hutchinson", "gradient": "full"},
}
"""Every estimator with every gradient that it has."""

DENSE = {"rtol": 1e-8, "atol": 1e-9}
"""A softmax in float64 and some thousand products in another order; traces of single tokens are of size 1 to 100."""


def freeze(model: nn.Module) -> nn.Module:
    """Train the norm scales alone: the closed form takes everything else for constant."""
    model.requires_grad_(False)
    for scale in oracle.scales(model).values():
        scale.requires_grad_()
    return model


def built(name: str) -> nn.Module:
    """A float32 model of one's own, with norm scales to train."""
    return freeze(families.build(name))


@cache
def frozen(name: str) -> nn.Module:
    """The oracle's model with norm scales to train, in float64, shared by the tests: leave it as it was."""
    return freeze(copy.deepcopy(oracle.model(name)))


def batch(name: str, padded: bool) -> dict[str, Tensor]:
    """Two sequences, the first with padding on the left and the second with padding on the right, or with none."""
    given = oracle.batch(name)
    if padded:
        given["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]], device=DEVICE)
    return given


def mask_of(given: dict[str, Tensor], tokens: int) -> Tensor:
    """1 at real tokens, (B, T)."""
    mask = given.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return torch.ones(len(next(iter(given.values()))), tokens, device=DEVICE)
    return mask


def own_blocks(step: oracle.OracleStep) -> Tensor:
    """J_ii P_i of every sequence and token, (B, T, d, d)."""
    dense = (step.dense(sequence) for sequence in range(len(step.stream)))
    return torch.stack([torch.stack([one[token, :, token] for token in range(len(one))]) for one in dense])


@dataclass(frozen=True)
class Solved:
    """One branch, or step, with one P, in float64: P of every token, (B, T, d), and C_i = −P_i⁻¹J_ii, (B, T, d, d)."""

    norm: str
    scale: Tensor
    preconditioner: Tensor
    landscape: Tensor

    def held(self, factors: Tensor) -> Tensor:
        """tr(P C P) of every token with γ `factors` times as large, (..., d), and C held fixed: (..., B, T)."""
        scaled = self.preconditioner * factors[..., None, None, :]
        return (scaled * self.landscape.diagonal(dim1=-2, dim2=-1) * scaled).sum(-1)


def solve(name: str, model: nn.Module, given: dict[str, Tensor]) -> list[list[Solved]]:
    """P and C of every step by dense Jacobians; parallel branches with a norm each are several parts of one step."""
    paths = {module: path for path, module in model.named_modules()}
    with oracle.Float64():
        return [
            [_solve(part, paths) for part in step.parts or (step,)]
            for step in oracle.steps(name, model, given, "sublayer")
        ]


def _solve(step: oracle.OracleStep, paths: dict[nn.Module, str]) -> Solved:
    preconditioner = (step.left.unsqueeze(-1) * step.right).detach()
    jacobian = own_blocks(step).detach() / preconditioner.unsqueeze(-2)
    return Solved(paths[step.norm], step.scale, preconditioner, -jacobian / preconditioner.unsqueeze(-1))


@cache
def solved(name: str, padded: bool) -> list[list[Solved]]:
    """The same of the oracle's model; shared by the tests."""
    return solve(name, frozen(name), batch(name, padded))


def measuring(model: nn.Module, **options: Any) -> ofa.Regularizers:
    """Regularizers that measure the trace alone, in closed form."""
    settings = {"step_ratio": 0.0, "sharpness": 1.0, "estimator": "exact", "radial": "exact", **options}
    return ofa.fused_regularizers(model, **settings)


def traces_of(model: nn.Module, given: dict[str, Tensor], **options: Any) -> Tensor:
    """h_t of every sequence, (steps, B), without gradients."""
    with measuring(model, **options) as reg, torch.no_grad(), reg.measuring():
        model(**given)
        return reg.measurements.traces


def mean_of(values: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Mean of (..., B, T) over the real tokens."""
    mask = mask_of(given, values.shape[-1]).double()
    return (values * mask).sum(-1) / mask.sum(-1)


def assert_dense(
    model: nn.Module, given: dict[str, Tensor], steps: list[list[Solved]], *, sign: float = 1.0, **options: Any
) -> None:
    """h_t of each sequence is tr(P C P), and the penalty's gradient its numerical derivative with C held fixed."""
    with oracle.Float64(), measuring(model, **options) as reg:
        model(**given)
        measured = reg.measurements.traces
        found = scale_gradients(model, reg.penalty())
    ones = torch.ones(len(steps[0][0].preconditioner[0, 0]), dtype=torch.float64, device=DEVICE)
    expected = torch.stack([sum(mean_of(part.held(ones), given) for part in parts) for parts in steps]) * sign
    torch.testing.assert_close(measured, expected, **DENSE)
    slopes, wanted = torch.sigmoid(expected) / expected.shape[1], {}
    for parts, slope in zip(steps, slopes, strict=True):
        for part in parts:
            # Central differences of a form of degree 2 have no error but rounding, however long the step.
            h = 0.5 * torch.diag(ones)
            moved = mean_of(part.held(ones + h) - part.held(ones - h), given) * sign
            wanted[part.norm] = (moved @ slope) / part.scale
    assert wanted.keys() == found.keys()
    for path, gradient in found.items():
        # Below `LOWEST` a slope counts as 0, where softplus has one of 1e-13.
        close = {"rtol": 1e-7, "atol": max(1e-7 * float(wanted[path].abs().max()), 1e-12)}
        torch.testing.assert_close(gradient, wanted[path], **close, msg=lambda text, path=path: f"{path}: {text}")


def scale_gradients(model: nn.Module, penalty: Tensor) -> dict[str, Tensor]:
    """The penalty's gradient by the path of the norm; the final norm, which comes after the last step, has none."""
    scales = oracle.scales(model)
    found = torch.autograd.grad(penalty, list(scales.values()), allow_unused=True)
    return {path.rpartition(".")[0]: g for path, g in zip(scales, found, strict=True) if g is not None}


PADDED = [(name, padded) for name in CLOSED for padded in (False, True) if not (name == "vit" and padded)]
"""Families with and without padding; images have none."""

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral with a window": ("mistral", {"sliding_window": 3}),
    "qwen2 with a window in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "yarn, whose rotation is no rotation": ("llama", {"rope_parameters": YARN}),
    "biases everywhere behind RMSNorm": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "biases in front of norms of heads": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "partial rotary, fused": ("phi3", {"partial_rotary_factor": 0.5}),
    "scores scaled otherwise": ("granite", {"residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "scores scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "relu, gated": ("llama", {"hidden_act": "relu"}),
    "soft caps that bend": ("gemma2", {"head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
}


def variant(monkeypatch: pytest.MonkeyPatch, name: str, **extra: Any) -> nn.Module:
    """A family's model with other settings, in float64."""
    build = families._other(name, **families.GPT, **extra) if name == "gpt2" else families._llama_like(name, **extra)
    monkeypatch.setitem(families.BUILDERS, name, build)
    return freeze(families.build(name).double())


def assert_gradient(
    model: nn.Module, given: dict[str, Tensor], reg: ofa.Regularizers, close: float = 1e-7, least: float = 1e-4
) -> None:
    """The penalty's gradient in every scale is what central differences give.

    Their error is h² = 10⁻¹⁰ times a third derivative, and the rounding 2⁻⁵³/h = 10⁻¹¹ times a penalty of 10².
    """
    h, generator, scales = 1e-5, torch.Generator().manual_seed(0), oracle.scales(model)

    def penalty() -> Tensor:
        reg.passes = 0
        model(**given)
        return reg.penalty()

    found = scale_gradients(model, penalty())
    assert len(found) >= len(scales) - 1  # the final norm comes after the last step
    for path, gradient in found.items():
        scale = scales[f"{path}.weight"]
        direction = torch.randn(scale.shape, generator=generator).to(scale)
        direction /= direction.norm()
        original, values = scale.data, []
        with torch.no_grad(), reg.measuring():
            for factor in (1, -1):
                scale.data = original + factor * h * direction
                values.append(penalty())
        scale.data = original
        slope = (values[0] - values[1]) / (2 * h)
        torch.testing.assert_close(
            (gradient * direction).sum(), slope, rtol=close, atol=close, msg=lambda text, path=path: f"{path}: {text}"
        )
        assert gradient.abs().max() > least, path


def trace_gradients(model: nn.Module, given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """∂h_t/∂γ, mean over the sequences, by the path of the norm.

    Softplus has slopes at h and −h that add up to 1, so it is the difference of the two conventions' gradients.
    """
    both = []
    for convention in ("theory", "algorithm1"):
        with measuring(model, convention=convention, **options) as reg:
            model(**given)
            both.append(scale_gradients(model, reg.penalty()))
    return {path: gradient - both[1][path] for path, gradient in both[0].items()}


def probes_of(step: int, stream: Tensor, *, seed: int = 0, number: int = 0, **options: Any) -> Tensor:
    """The probes ν of a step in the `number`-th measured pass: key (seed, pass), one row per token of the batch."""
    rows, width = stream.shape[0] * stream.shape[1], stream.shape[2]
    key = (seed << 32) | number
    nu = philox.probes(rows, width, seed=key, step=step, device=stream.device, **options)
    return nu.view(-1, *stream.shape).double()


def spread(dense: Tensor, probe: str, tokens: int) -> float:
    """Standard deviation of νᵀMν/n: 2‖S‖²_F for Gaussian ν, less the diagonal for Rademacher; S is symmetric."""
    matrix = dense.reshape(dense.shape[0] * dense.shape[1], -1)
    symmetric = (matrix + matrix.T) / 2
    squares = symmetric.square().sum() - (symmetric.diagonal().square().sum() if probe == "rademacher" else 0)
    return math.sqrt(2 * float(squares)) / tokens


def own_token_trace(dense: Tensor) -> float:
    """Σ_i tr(J_ii P_i)/n, from the blocks of the tokens' own."""
    tokens = range(len(dense))
    return sum(float(dense[token, :, token].diagonal().sum()) for token in tokens) / len(dense)


class Failing(nn.Module):
    """Raises an exception in its `number`-th forward pass."""

    def __init__(self, module: nn.Module, number: int = 1) -> None:
        super().__init__()
        self.module, self.left = module, number

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise OSError("device lost")
        return self.module(*args, **kwargs)


HOOKS = [name for name in vars(nn.Module()) if "hook" in name and isinstance(vars(nn.Module())[name], dict)]


def hooks_of(model: nn.Module) -> dict[str, list[int]]:
    """Every hook of every module, by the dictionary that holds it."""
    return {f"{path}:{name}": list(vars(module)[name]) for path, module in model.named_modules() for name in HOOKS}


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(oracle.scales(model).values())))


def training_model(name: str, *, checkpointing: bool, reentrant: bool = False) -> nn.Module:
    """The family's model in float64 and training mode, without dropout."""
    model = families.build(name).double().train()
    for module in model.modules():
        for attribute, value in vars(module).items():
            if isinstance(value, float) and ("drop" in attribute or isinstance(module, nn.Dropout)):
                setattr(module, attribute, 0.0)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model
