"""Forward-mode probes that stay with their token, against own-token blocks of dense Jacobians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import ofa
from tests import families, oracle
from tests.ofa.traces import (
    CLOSED,
    PADDED,
    VARIANTS,
    assert_gradient,
    batch,
    built,
    by_token,
    frozen,
    mask_of,
    measuring,
    own_blocks,
    probes_of,
    solved,
    spread,
    variant,
)

LOCAL = {"estimator": "local_jvp"}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
"""A softmax in float64 and some thousand products in another order, of values up to 100."""

STEPS = ["llama", "qwen3", "gpt2", "falcon"]


@pytest.mark.parametrize(("name", "padded"), PADDED)
def test_the_estimate_is_the_quadratic_form_of_own_blocks(name: str, padded: bool) -> None:
    """Each family, N = 3: ν_iᵀ J_ii P_i ν_i of every token and probe, with the ν of the Philox key, and h_t of them."""
    model, given, blocks = frozen(name), batch(name, padded), solved(name, padded)
    with oracle.Float64():
        tokens, measured = by_token(model, given, samples=3, seed=5, **LOCAL)
    mask = mask_of(given, tokens.shape[-1]).double()
    for index, block in enumerate(blocks):
        nus = probes_of(index, block[..., 0], seed=5, samples=3)
        expected = torch.einsum("sbti,btij,sbtj->sbt", nus, block, nus).detach() * mask
        torch.testing.assert_close(tokens[index] * mask, expected, **CLOSE)
        torch.testing.assert_close(measured[index], -expected.mean(0).sum(-1) / mask.sum(-1), **CLOSE)


def assert_quadratic(tokens: Tensor, block: Tensor, index: int) -> None:
    """Two probes' estimates of a step, (2, B, T), are the quadratic forms of its own blocks, (B, T, d, d)."""
    nus = probes_of(index, block[..., 0], samples=2)
    torch.testing.assert_close(tokens, torch.einsum("sbti,btij,sbtj->sbt", nus, block, nus).detach(), **CLOSE)


def deviation(blocks: Tensor, probe: str) -> float:
    """Standard deviation of Σ_i ν_iᵀ M_ii ν_i of one sequence's own blocks, (T, d, d)."""
    return math.sqrt(sum((spread(block.unsqueeze(0).transpose(0, 1), probe, 1)) ** 2 for block in blocks))


@pytest.mark.parametrize(
    ("name", "probe"),
    [("llama", "rademacher"), ("qwen3", "gaussian"), ("gpt2", "rademacher"), ("falcon", "gaussian")],
)
def test_the_mean_over_many_probes_is_the_exact_trace(name: str, probe: str) -> None:
    """Unbiased: 200 probes of either law stay within 3 standard errors of the closed form, for every step."""
    samples, model, given = 200, frozen(name), oracle.batch(name, sequences=1, tokens=3)
    with oracle.Float64():
        exact = by_token(model, given)[1][:, 0]
        mean = by_token(model, given, samples=samples, probe=probe, seed=1, **LOCAL)[1][:, 0]
        for index, step in enumerate(oracle.steps(name, model, given, "sublayer")):
            blocks = own_blocks(step)[0]
            error = 3 * deviation(blocks, probe) / len(blocks) / math.sqrt(samples)
            assert abs(float(mean[index] - exact[index])) <= error, index


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_noise_between_tokens_is_gone(name: str) -> None:
    """The variance over 400 probes is 2 Σ_i(‖S_ii‖² − diag), that of `jvp` 2(‖S‖² − diag): more, where tokens meet.

    An MLP is local by itself, so that both give the same values there, probe by probe.
    """
    samples, model, given = 400, frozen(name), oracle.batch(name, sequences=1, tokens=3)
    with oracle.Float64():
        local, whole = (
            by_token(model, given, samples=samples, seed=2, estimator=estimator)[0][:, :, 0]
            for estimator in ("local_jvp", "jvp")
        )
        for index, step in enumerate(oracle.steps(name, model, given, "sublayer")):
            dense = step.dense(0)
            own = deviation(own_blocks(step)[0], "rademacher") ** 2
            every = (spread(dense, "rademacher", 1)) ** 2
            # A variance over M values deviates by √((κ − 1)/M), κ ≤ 15 for a quadratic form.
            error = 3 * math.sqrt(14 / samples)
            assert float(local[index].sum(-1).var()) == pytest.approx(own, rel=error)
            assert float(whole[index].sum(-1).var()) == pytest.approx(every, rel=error)
            if index % 2:
                torch.testing.assert_close(local[index], whole[index], **CLOSE)
            else:
                assert own < every
                assert local[index].sum(-1).var() < whole[index].sum(-1).var()


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", STEPS)
def test_the_penalty_has_the_gradient_of_its_differences(name: str, samples: int) -> None:
    """λ₁J + λ₂H along a direction in every γ, by autograd and by central differences with the same probes."""
    model, given = frozen(name), oracle.batch(name, sequences=1, tokens=4)
    with oracle.Float64(), measuring(model, step_ratio=0.7, samples=samples, **LOCAL) as reg:
        assert_gradient(model, given, reg)


def test_the_gradient_is_right_with_padding() -> None:
    """Fully masked rows put neither NaN into the gradient of γ nor a part of it."""
    with oracle.Float64(), measuring(frozen("llama"), samples=3, **LOCAL) as reg:
        assert_gradient(frozen("llama"), batch("llama", padded=True), reg)


@pytest.mark.parametrize("case", VARIANTS)
def test_settings_of_a_family_are_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, scales of scores, and biases, which are no part of a tangent: ν_iᵀ J_ii P_i ν_i of every token."""
    name, extra = VARIANTS[case]
    model, given = variant(monkeypatch, name, **extra), oracle.batch(name, tokens=7, sequences=1)
    with oracle.Float64():
        tokens, _ = by_token(model, given, samples=2, **LOCAL)
        for index, step in enumerate(oracle.steps(name, model, given, "sublayer")):
            assert_quadratic(tokens[index], own_blocks(step), index)


@pytest.mark.parametrize("sequences", [1, 5])
def test_batches_of_any_size(sequences: int) -> None:
    """One sequence, and as many as there are tokens: nothing is taken for a batch that is none."""
    model, given = frozen("llama"), oracle.batch("llama", sequences=sequences)
    with oracle.Float64():
        tokens, _ = by_token(model, given, samples=2, **LOCAL)
        steps = oracle.steps("llama", model, given, "sublayer")
        for index in (0, 1):
            assert_quadratic(tokens[index], own_blocks(steps[index]), index)


def test_passes_and_seeds_have_their_own_probes() -> None:
    """The same pass and seed give the same bits; others, others. Half of the steps have the values of all of them."""
    model, given = built("llama"), families.inputs("llama")
    runs = []
    for options in ({}, {}, {"seed": 9}, {"steps": 0.5}):
        with measuring(model, **LOCAL, **options) as reg, torch.no_grad(), reg.measuring():
            for _ in range(2):
                model(**given)
                runs.append(reg.measurements.traces)
    first, second, *others = runs
    assert torch.equal(first, others[0])
    assert torch.equal(second, others[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, others[2])
    seen = ~others[4].isnan()
    assert seen.all(1).sum() == seen.any(1).sum() == 3
    # A step that is not measured has a narrower batch, whose sums a GPU may order otherwise: 2⁻²⁴ each, through three
    # layers.
    torch.testing.assert_close(others[4][seen], first[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CLOSED)
def test_the_model_computes_what_it_did(name: str) -> None:
    """Measured in float32: outputs up to rounding, also with three probes."""
    model, given = built(name), families.inputs(name)
    plain = model(**given)
    with measuring(model, samples=3, **LOCAL) as reg:
        measured = model(**given)
        assert reg.measurements.traces.isfinite().all()
    # A wider batch may be summed in another order: 2⁻²⁴ each, through three layers.
    torch.testing.assert_close(measured.logits, plain.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(**given).logits, plain.logits)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "falcon", "phi3"])
def test_bfloat16_is_close_to_float32(name: str) -> None:
    """A bfloat16 model with tuned float32 scales trains, and has the traces of float32 up to a twentieth."""
    given, measured = families.inputs(name), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = families.build(name)
        model.get_input_embeddings().weight.data /= 0.15  # σ ≈ 1, as in trained models behind the first layers
        tuned = ofa.tune_norms(model.to(dtype))
        with measuring(model, step_ratio=1.0, samples=4, **LOCAL) as reg:
            (model(**given).loss + reg.penalty()).backward()
            measured[dtype] = reg.measurements.traces.detach()
        assert all(scale.grad.dtype == torch.float32 and scale.grad.isfinite().all() for scale in tuned)
    # 2⁻⁹ for each of the dozen roundings between a stream and its branch's end, and for those of all steps before.
    error = (measured[torch.bfloat16] - measured[torch.float32]).norm()
    assert error <= 0.05 * measured[torch.float32].norm()
