"""The measurements and their gradients against the oracle's steps and differences, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ofa
from ofa.regularizers import objectives
from tests import oracle
from tests.cases import over_pairs
from tests.ofa.traces import DENSE, assert_gradient

GRADIENTS = [(name, "sublayer") for name in ("llama", "gpt2", "gemma3", "olmo2", "phi", "bert")]
GRADIENTS += [("llama", "layer"), ("bert", "layer")]


def measure(model: nn.Module, given: dict[str, Tensor], **options: Any) -> objectives.Measurements:
    """Measurements of one forward pass without gradients, both terms on."""
    settings = {"step_ratio": 1.0, "sharpness": 1.0, "tokens": "all", **options}
    with ofa.fused_regularizers(model, **settings) as reg, torch.no_grad(), reg.measuring():
        model(**given)
        return reg.measurements


@pytest.mark.parametrize(("name", "granularity"), oracle.CASES)
def test_step_lengths_are_those_of_the_residual_stream(name: str, granularity: str) -> None:
    """Each family and granularity: lengths, ratios and J of the updates that the layers add to the stream."""
    with oracle.Float64():
        given = oracle.batch(name)
        measured = measure(oracle.model(name), given, granularity=granularity, sharpness=0.0)
        norms = oracle.step_norms(oracle.steps(name, oracle.model(name), given, granularity))
    # A few hundred squares in another order; BERT's updates are differences of larger numbers.
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(measured.step_norms, norms, **close)
    torch.testing.assert_close(measured.ratios, norms[1:] / norms[:-1], **close)
    torch.testing.assert_close(measured.step_ratio, (norms[1:] / norms[:-1]).sum(0).mean(), **close)


def padded(name: str, side: str, pad_id: int = 0) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Sequences of 6 and 4 tokens as one padded batch, and each alone."""
    ids = oracle.batch(name, tokens=6)["input_ids"]
    mask = torch.ones_like(ids)
    real = slice(0, 4) if side == "right" else slice(2, 6)
    alone = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, real]}]
    mask[1] = 0
    mask[1, real] = 1
    whole = {"input_ids": ids.masked_fill(mask == 0, pad_id), "attention_mask": mask}
    if name == "gpt2":  # learned positions: count real tokens only
        whole["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return whole, alone


@over_pairs(
    name=["llama", "gpt2", "opt", "falcon_two_norms", "bert"],
    side=["right", "left"],
    tokens=["no-sinks", "all", "last"],
)
def test_padding_changes_nothing(name: str, side: str, tokens: str) -> None:
    """A padded batch has the step lengths and traces of its sequences, with padding on either side."""
    if name == "bert" and side == "left":
        side = "right"  # its positions are absolute
    with oracle.Float64():
        whole, alone = padded(name, side)
        options = {"sharpness": float(name != "bert"), "tokens": tokens}  # other rows have other probes
        together = measure(oracle.model(name), whole, **options)
        each = [measure(oracle.model(name), given, **options) for given in alone]
    # Left padding shifts the rotary angles, which changes the roundings (2⁻⁵³) of some thousand products.
    torch.testing.assert_close(together.step_norms, torch.cat([one.step_norms for one in each], 1), **DENSE)
    if name != "bert":
        torch.testing.assert_close(together.traces, torch.cat([one.traces for one in each], 1), **DENSE)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_padding_ids_do_not_matter(name: str, side: str) -> None:
    """With the same probes, other padding ids give the same lengths and traces."""
    first, second = (measure(oracle.model(name), padded(name, side, pad_id=pad)[0]) for pad in (0, 7))
    # Masked weights are exactly 0, so only a library's order of sums could differ; ε magnifies it 10⁵ times.
    torch.testing.assert_close(first.step_norms, second.step_norms, rtol=1e-12, atol=0)
    torch.testing.assert_close(first.traces, second.traces, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_gradient_is_finite_with_padding(side: str) -> None:
    """Fully masked rows must not put NaN into the gradient of γ."""
    model = oracle.model("llama")
    with ofa.fused_regularizers(model, 1.0, 1.0) as reg:
        model(**padded("llama", side)[0])
        gradients = torch.autograd.grad(reg.penalty(), list(oracle.scales(model).values())[:-1])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_last_token_is_the_last_real_one() -> None:
    """`tokens="last"`: only the last real token's step, with and without a mask."""
    with oracle.Float64():
        model = oracle.model("llama")
        for given, last in ((padded("llama", "right")[0], [5, 3]), (oracle.batch("llama", tokens=6), [5, 5])):
            measured = measure(model, given, sharpness=0.0, tokens="last").step_norms
            updates = [step.function(step.stream) for step in oracle.steps("llama", model, given, "sublayer")]
            expected = torch.stack([update[[0, 1], last].norm(dim=-1) for update in updates])
            torch.testing.assert_close(measured, expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "granularity"), GRADIENTS)
def test_the_full_gradient_of_probes_is_that_of_differences(name: str, granularity: str) -> None:
    """λ₁J + λ₂H along a direction in every γ, by autograd and by central differences with the same probes."""
    model, given = oracle.model(name), oracle.batch(name, sequences=1)
    options = {"estimator": "hutchinson", "gradient": "full", "granularity": granularity}
    with oracle.Float64(), ofa.fused_regularizers(model, 0.7, 0.3, **options) as reg:
        # The rounding is 10⁻¹⁶·|νᵀF|/(ε h) ≈ 10⁻⁵ with the default ε.
        assert_gradient(model, given, reg, close=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "olmo2", "bert"])
def test_attention_has_a_part_in_the_gradient(name: str) -> None:
    """The trace of each attention step depends on that step's γ."""
    model, given = oracle.model(name), oracle.batch(name, sequences=1)
    with ofa.fused_regularizers(model, 0.0, 1.0, estimator="hutchinson", gradient="full") as reg:
        model(**given)
        traces = reg.measurements.traces
        for index, step in enumerate(reg.steps):
            if step.branches[0].role == "attention":
                scale = model.get_submodule(step.branches[0].norm.path).weight
                (gradient,) = torch.autograd.grad(traces[index].sum(), scale, retain_graph=True)
                assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("granularity", ["sublayer", "layer"])
def test_splitting_a_batch_does_not_change_the_terms(granularity: str) -> None:
    """J and H are means over sequences: those of two halves average to those of the whole, given the same traces."""
    model, given = oracle.model("llama"), oracle.batch("llama", sequences=4)
    whole = measure(model, given, granularity=granularity)
    halves = [objectives.sharpness(part) for part in (whole.traces[:, :2], whole.traces[:, 2:])]
    torch.testing.assert_close(sum(halves) / 2, whole.sharpness)
    ratios = [
        measure(model, {k: v[rows] for k, v in given.items()}, granularity=granularity).step_ratio
        for rows in (slice(0, 2), slice(2, 4))
    ]
    # float32 inside Llama's norms: some roundings of 2⁻²⁴.
    torch.testing.assert_close(sum(ratios) / 2, whole.step_ratio, rtol=1e-5, atol=0)
