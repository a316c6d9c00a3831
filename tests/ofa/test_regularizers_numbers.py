"""What the regularizers measure, and its gradient, against hand-made steps and differences in float64."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ofa
from ofa import objectives
from tests import oracle

GRADIENTS = [(name, "sublayer") for name in ("llama", "gpt2", "gemma3", "olmo2", "phi", "bert")]
GRADIENTS += [("llama", "layer"), ("bert", "layer")]


def measure(model: nn.Module, given: dict[str, Tensor], **options: Any) -> objectives.Measurements:
    """Measurements of one forward pass without gradients, both terms on."""
    settings = {"step_ratio": 1.0, "sharpness": 1.0, **options}
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
    # Sums of a few hundred squares in another order, and BERT's updates as differences of larger numbers.
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


@pytest.mark.parametrize("tokens", ["all", "last"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon_two_norms", "bert"])
def test_padding_adds_exactly_nothing(name: str, side: str, tokens: str) -> None:
    """A padded batch has the step lengths of its sequences alone, whichever side is padded."""
    if name == "bert" and side == "left":
        side = "right"  # its positions are absolute and cannot be moved
    with oracle.Float64():
        whole, alone = padded(name, side)
        options = {"sharpness": 0.0, "tokens": tokens}
        together = measure(oracle.model(name), whole, **options).step_norms
        each = [measure(oracle.model(name), given, **options).step_norms for given in alone]
    # Left padding turns the rotary angles, which changes the roundings (2⁻⁵³) of some thousand products.
    torch.testing.assert_close(together, torch.cat(each, 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_what_stands_in_the_padding_does_not_matter(name: str, side: str) -> None:
    """Other padding ids, same probes: same lengths and traces."""
    first, second = (measure(oracle.model(name), padded(name, side, pad_id=pad)[0]) for pad in (0, 7))
    # Masked weights are exactly 0, so nothing but the order of a library's sums could differ; ε magnifies it 10⁵ times.
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
    """`tokens="last"`: the step of the prediction token alone, by hand, with and without a mask."""
    with oracle.Float64():
        model = oracle.model("llama")
        for given, last in ((padded("llama", "right")[0], [5, 3]), (oracle.batch("llama", tokens=6), [5, 5])):
            measured = measure(model, given, sharpness=0.0, tokens="last").step_norms
            updates = [step.function(step.stream) for step in oracle.steps("llama", model, given, "sublayer")]
            expected = torch.stack([update[[0, 1], last].norm(dim=-1) for update in updates])
            torch.testing.assert_close(measured, expected.detach(), rtol=1e-9, atol=1e-9)


def test_sampled_steps_are_measured_as_all_would_be() -> None:
    """`steps=0.5` measures half of the steps with the probes they always have; the others are NaN."""
    model, given = oracle.model("llama"), oracle.batch("llama")
    with oracle.Float64():
        whole, half = measure(model, given).traces, measure(model, given, steps=0.5)
    seen = ~half.traces.isnan()
    assert seen.all(1).sum() == 3
    assert (seen.all(1) == seen.any(1)).all()
    # Wider batches may round differently, by 2⁻⁵³, which the division by ε magnifies 10⁵ times.
    torch.testing.assert_close(half.traces[seen], whole[seen], rtol=1e-8, atol=1e-8)
    assert half.step_norms.isfinite().all()
    expected = F.softplus(whole)[seen.all(1)].sum(0).mean() * 2
    torch.testing.assert_close(half.sharpness, expected)
    assert (~measure(model, given, steps=0.01).traces.isnan()).all(1).sum() == 1


def test_sampled_steps_are_unbiased() -> None:
    """The mean of H over all subsets of 3 of 6 steps is the full H, and every step is drawn equally often."""
    model, given = oracle.model("llama"), oracle.batch("llama")
    measured = measure(model, given)
    subsets = list(itertools.combinations(range(6), 3))
    mean = sum(objectives.sharpness(measured.traces[list(subset)], 6) for subset in subsets) / len(subsets)
    torch.testing.assert_close(mean, measured.sharpness)
    draws: Counter[int] = Counter()
    different = set()
    with ofa.fused_regularizers(model, 0.0, 1.0, steps=0.5, seed=3) as reg:
        for reg.passes in range(600):
            drawn = reg._draw_steps()
            draws.update(drawn)
            different.add(drawn)
    # Each count is binomial(600, 1/2), deviation 12.2; 4 deviations for six counts.
    assert all(abs(draws[step] - 300) <= 49 for step in range(6))
    assert len(different) == 20


def test_sampled_steps_depend_on_the_seed() -> None:
    """Two seeds draw different steps in the same passes."""
    model = oracle.model("llama")

    def draws(seed: int) -> list[frozenset[int]]:
        with ofa.fused_regularizers(model, 0.0, 1.0, steps=0.5, seed=seed) as reg:
            return [reg._draw_steps() for reg.passes in range(8)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


@pytest.mark.parametrize(("name", "granularity"), GRADIENTS)
def test_the_penalty_has_the_gradient_of_its_differences(name: str, granularity: str) -> None:
    """λ₁J + λ₂H along a direction in every γ, by autograd and by central differences with the same probes."""
    h = 1e-5
    generator = torch.Generator().manual_seed(0)
    model, given = oracle.model(name), oracle.batch(name, sequences=1)
    scales = oracle.scales(model)
    with oracle.Float64(), ofa.fused_regularizers(model, 0.7, 0.3, granularity=granularity) as reg:

        def penalty() -> Tensor:
            reg.passes = 0
            model(**given)
            return reg.penalty()

        gradients = torch.autograd.grad(penalty(), list(scales.values()), allow_unused=True)
        for (path, scale), gradient in zip(scales.items(), gradients, strict=True):
            if gradient is None:  # the final norm stands behind the last step
                assert path.rpartition(".")[0] == reg.anatomy.norms[-1].path
                continue
            direction = torch.randn(scale.shape, generator=generator).to(scale)
            direction /= direction.norm()
            original, values = scale.data, []
            with torch.no_grad(), reg.measuring():
                for factor in (1, -1):
                    scale.data = original + factor * h * direction
                    values.append(penalty())
            scale.data = original
            # The error is h² times a third derivative, and the rounding 10⁻¹⁶·|νᵀF|/(ε h) ≈ 10⁻⁵ with the default ε.
            slope = (values[0] - values[1]) / (2 * h)
            torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-4, msg=path)
            assert gradient.abs().max() > 1e-4, path


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "olmo2", "bert"])
def test_attention_has_a_part_in_the_gradient(name: str) -> None:
    """The trace of each attention step depends on the γ of that step: attention kernels without this are no use."""
    model, given = oracle.model(name), oracle.batch(name, sequences=1)
    with ofa.fused_regularizers(model, 0.0, 1.0) as reg:
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
    halves = [objectives.sharpness(part, len(whole.traces)) for part in (whole.traces[:, :2], whole.traces[:, 2:])]
    torch.testing.assert_close(sum(halves) / 2, whole.sharpness)
    ratios = [
        measure(model, {k: v[rows] for k, v in given.items()}, granularity=granularity).step_ratio
        for rows in (slice(0, 2), slice(2, 4))
    ]
    # float32 inside Llama's norms: some roundings of 2⁻²⁴.
    torch.testing.assert_close(sum(ratios) / 2, whole.step_ratio, rtol=1e-5, atol=0)
