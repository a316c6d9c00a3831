"""The paper's loop and the batched regularizers are the same function, value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ofa
from benchmarks.algorithm1 import PlainLoop
from tests.cases import over_pairs
from tests.families import build, inputs

WEIGHTS = {"step_ratio": 0.3, "sharpness": 0.7}
LOOPED = {"estimator": "hutchinson", "gradient": "full", "tokens": "all"}
"""What the loop measures."""
NORM_BEFORE = ("qwen3", "granite", "phi", "gpt2", "falcon", "gpt_neox")
NORM_AFTER = ("olmo2", "opt_post_norm", "bert")


@over_pairs(
    precision=[(torch.float64, 1e-4), (torch.float32, 1e-2)],
    granularity=["sublayer", "layer"],
    convention=["theory", "algorithm1"],
    samples=[1, 3],
    masked=[False, True],
)
def test_plain_loop_equals_batched(precision, granularity, convention, samples, masked):
    dtype, epsilon = precision
    batch = padded(inputs("llama")) if masked else inputs("llama")
    options = {"granularity": granularity, "convention": convention, "samples": samples, "epsilon": epsilon, "seed": 5}
    assert_equal_to_rounding(dtype, epsilon, *batched_and_plain("llama", dtype, batch, **options))


@pytest.mark.parametrize("name", NORM_BEFORE)
def test_whole_layers_of_other_families(name):
    options = {"granularity": "layer", "samples": 2, "epsilon": 1e-4}
    assert_equal_to_rounding(torch.float64, 1e-4, *batched_and_plain(name, torch.float64, inputs(name), **options))


@pytest.mark.parametrize("name", NORM_AFTER)
def test_whole_layers_with_the_norm_after_the_branch(name):
    # σ is known only after the branch: the loop displaces by εγν/σ, the batched pass by εγν and divides later. With
    # one token per sequence (no other token's σ to meet) they differ by curvature alone, which is proportional to ε.
    gaps = []
    for epsilon in (1e-4, 1e-5):
        batch = inputs(name, tokens=1)
        (value, _), (expected, _) = batched_and_plain(name, torch.float64, batch, granularity="layer", epsilon=epsilon)
        gaps.append(float((value - expected).abs() / expected.abs()))
    assert gaps[0] < 1e-2
    assert gaps[1] == pytest.approx(gaps[0] / 10, rel=0.1)


def test_probes_change_from_pass_to_pass_alike():
    model, batch = double("llama"), inputs("llama")
    options = {"granularity": "layer", "epsilon": 1e-4, "seed": 7}
    with PlainLoop(model, **WEIGHTS, **options) as loop:
        expected = values_of_two_passes(loop, model, batch)
    with ofa.fused_regularizers(model, **WEIGHTS, **LOOPED, **options) as batched:
        assert values_of_two_passes(batched, model, batch) == pytest.approx(expected, rel=1e-9)
    assert expected[0] != expected[1]


def test_refuses_sublayers_that_are_not_one_module():
    with pytest.raises(ValueError, match="granularity='layer'"):
        PlainLoop(build("phi"), granularity="sublayer")


def test_close_removes_every_hook():
    model = build("llama")
    PlainLoop(model).close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def batched_and_plain(name, dtype, batch, **options):
    """(value, gradient in all norm scales) by the batched regularizers, and by the plain loop."""
    model = double(name) if dtype == torch.float64 else build(name)
    scales = ofa.tune_norms(model)
    with ofa.fused_regularizers(model, **WEIGHTS, **LOOPED, **options) as batched:
        got = value_and_gradient(batched, model, scales, batch)
    with PlainLoop(model, **WEIGHTS, **options) as loop:
        return got, value_and_gradient(loop, model, scales, batch)


def value_and_gradient(regularizers, model, scales, batch):
    model(**batch)
    value = regularizers.penalty()
    return value.detach(), torch.cat(torch.autograd.grad(value, scales, materialize_grads=True))


def values_of_two_passes(regularizers, model, batch):
    values = []
    for _ in range(2):
        model(**batch)
        values.append(regularizers.penalty().item())
    return values


def double(name):
    """The family in float64 throughout: Hugging Face's RMSNorm rounds to float32 in any model, PyTorch's does not."""
    model = build(name)
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            native = nn.RMSNorm(module.weight.numel(), eps=module.variance_epsilon)
            native.weight = module.weight
            model.set_submodule(path, native)
    return model.double()


def padded(batch):
    mask = torch.ones_like(batch["input_ids"])
    mask[0, -2:] = 0
    return {**batch, "attention_mask": mask}


def assert_equal_to_rounding(dtype, epsilon, got, expected):
    # A difference quotient divides the rounding of F(Z + εPν) − F(Z) by ε, in the value and in its gradient.
    # 100 covers the roundings in series in three layers; both are relative to the largest entry, as rounding is.
    tolerance = 100 * torch.finfo(dtype).eps / epsilon
    for actual, wanted in zip(got, expected, strict=True):
        assert (actual - wanted).abs().max() < tolerance * wanted.abs().max()
