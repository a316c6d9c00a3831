"""The probes' estimate against dense Jacobians of `tests.oracle`, in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ofa
from tests import families, oracle
from tests.ofa.traces import own_token_trace, probes_of, spread

EPSILON = 1e-7
DENSE = ["llama", "gpt2", "gemma3", "olmo2", "falcon_two_norms", "bert"]
"""One family per wiring; dense Jacobians of all of them would say nothing new."""


def measure(name: str, given: dict[str, Tensor], *, passes: int = 1, **options: Any) -> Tensor:
    """Measured traces h_t, (passes, steps, sequences)."""
    settings = {"step_ratio": 0.0, "sharpness": 1.0, "epsilon": EPSILON, **options}
    model = oracle.model(name)
    traces = []
    with ofa.fused_regularizers(model, **settings) as reg, torch.no_grad(), reg.measuring():
        for _ in range(passes):
            model(**given)
            traces.append(reg.measurements.traces)
    return torch.stack(traces)


def rounding(step: oracle.OracleStep, nu: Tensor) -> Tensor:
    """Rounding of νᵀΔ/ε: each output carries a few dozen roundings (its matrix products) of relative size 2⁻⁵³."""
    size = (nu * step.left.unsqueeze(-1) * (step.function(step.stream).abs() + step.stream.abs())).abs().sum((1, 2))
    return 64 * 2**-53 * size.detach() / EPSILON


@pytest.mark.parametrize(("name", "granularity"), oracle.CASES)
def test_the_estimate_is_the_quadratic_form_of_its_own_probes(name: str, granularity: str) -> None:
    """Each family and granularity: h_t = −(1/n) νᵀ J_t P_t ν, with the ν that the Philox key gives."""
    with oracle.Float64():
        given = oracle.batch(name)
        measured = measure(name, given, granularity=granularity, seed=5)[0]
        steps = oracle.steps(name, oracle.model(name), given, granularity)
        assert len(measured) == len(steps)
        for index, step in enumerate(steps):
            nu = probes_of(index, step.stream, seed=5, samples=1)[0]
            expected = step.quadratic(nu)
            # The finite difference is the mean of νᵀJPν along the way it moves, so it lies within what that changes by.
            moved = step.quadratic(nu, at=step.stream + EPSILON * step.right * nu)
            tolerance = 2 * (moved - expected).abs() + rounding(step, nu)
            tokens = step.stream.shape[1]
            error = (measured[index] + expected / tokens).abs()
            assert (error <= tolerance / tokens).all(), (index, error, tolerance / tokens)
            # The tolerance must be able to tell a wrong P or σ from a right one.
            assert (tolerance <= 1e-2 * (1 + expected.abs())).all()


@pytest.mark.parametrize("name", DENSE)
def test_the_dense_oracle_is_causal_and_agrees_with_its_own_products(name: str) -> None:
    """The oracle itself: its two forms agree, and a token's update does not depend on later tokens (except in BERT)."""
    with oracle.Float64():
        given = oracle.batch(name)
        for index, step in enumerate(oracle.steps(name, oracle.model(name), given, "sublayer")):
            nu = probes_of(index, step.stream, samples=1)[0]
            dense = step.dense(1)
            tokens = torch.arange(len(dense))
            above = dense.permute(0, 2, 1, 3)[tokens.view(-1, 1) < tokens]
            assert (above == 0).all() == (name != "bert" or index % 2 == 1)
            product = torch.einsum("td,tdse,se->", nu[1], dense, nu[1])
            # Two orders of summing a few thousand products.
            torch.testing.assert_close(product, step.quadratic(nu)[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
@pytest.mark.parametrize("name", DENSE)
def test_the_mean_over_many_probes_is_the_dense_trace(name: str, probe: str) -> None:
    """Unbiased: 400 probes of either law stay within 3.5 standard errors of −tr(J P)/n, whose size is known exactly."""
    samples = 400
    with oracle.Float64():
        given = oracle.batch(name, sequences=1)
        measured = measure(name, given, samples=samples, probe=probe)[0, :, 0]
        for index, step in enumerate(oracle.steps(name, oracle.model(name), given, "sublayer")):
            dense = step.dense(0)
            error = float(measured[index]) + own_token_trace(dense)
            # 3.5 and not 3: forty-odd values are held to it at once.
            assert abs(error) <= 3.5 * spread(dense, probe, len(dense)) / math.sqrt(samples), index


@pytest.mark.parametrize("samples", [1, 8, 64])
def test_the_error_falls_with_the_square_root_of_the_probes(samples: int) -> None:
    """At a fixed budget N the error has the standard deviation σ/√N, σ from the dense Jacobian; no early stopping."""
    passes = 20
    with oracle.Float64():
        given = oracle.batch("llama", sequences=1)
        measured = measure("llama", given, passes=passes, samples=samples, seed=samples)[..., 0]
        scores = []
        for index, step in enumerate(oracle.steps("llama", oracle.model("llama"), given, "sublayer")):
            dense = step.dense(0)
            errors = measured[:, index] + own_token_trace(dense)
            scores.append(errors * math.sqrt(samples) / spread(dense, "rademacher", len(dense)))
    squares = torch.stack(scores).square()
    # The mean of M squares with mean 1 deviates by √((κ − 1)/M); a quadratic form has κ ≤ 3 + 12/N (one direction).
    deviation = math.sqrt((2 + 12 / samples) / squares.numel())
    assert abs(float(squares.mean()) - 1) <= 3 * deviation


@pytest.mark.parametrize("granularity", ["sublayer", "layer"])
def test_the_conventions_differ_in_sign_alone(granularity: str) -> None:
    """`convention="algorithm1"` is the exact negative of the theory's sign."""
    given = oracle.batch("llama")
    theory = measure("llama", given, granularity=granularity, convention="theory")
    assert torch.equal(measure("llama", given, granularity=granularity, convention="algorithm1"), -theory)
    assert (theory != 0).all()


def test_more_samples_are_the_mean_of_single_ones() -> None:
    """`samples=N` averages the estimates of N different probes, the same ones a pass of N samples numbers 0 … N − 1."""
    with oracle.Float64():
        given = oracle.batch("gpt2")
        measured = measure("gpt2", given, samples=3)[0]
        step = oracle.steps("gpt2", oracle.model("gpt2"), given, "sublayer")[2]
        nus = probes_of(2, step.stream, samples=3)
        each = torch.stack([step.quadratic(nu) for nu in nus])
    assert not torch.equal(nus[0], nus[1])
    # Each of the three finite differences is within 1e-2 of its limit, see the first test.
    torch.testing.assert_close(measured[2], -each.mean(0) / 5, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon_alibi", "bert"])
def test_attention_implementations_agree(name: str) -> None:
    """Eager attention takes other arguments (Falcon's alibi), which must be widened too: the traces are the same."""
    measured = []
    for implementation in ("eager", "sdpa"):
        model = families.build(name).double()
        model.set_attn_implementation(implementation)
        with oracle.Float64(), ofa.fused_regularizers(model, 0.0, 1.0) as reg, torch.no_grad(), reg.measuring():
            model(**oracle.batch(name))
            measured.append(reg.measurements.traces)
    # Other orders of summing, 2⁻⁵³ each, magnified 10⁵ times by the default ε of float64 and by updates of size 10².
    torch.testing.assert_close(*measured, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padding_enters_neither_the_trace_nor_its_mean(padding_side: str) -> None:
    """With an attention mask the trace is the own-token sum over real tokens, divided by their number."""
    with oracle.Float64():
        given = oracle.batch("llama")
        mask = torch.ones_like(given["input_ids"])
        mask[1, slice(3, None) if padding_side == "right" else slice(None, 2)] = 0
        given = {**given, "attention_mask": mask}
        measured = measure("llama", given)[0]
        for index, step in enumerate(oracle.steps("llama", oracle.model("llama"), given, "sublayer")):
            nu = probes_of(index, step.stream, samples=1)[0]
            real = dataclasses.replace(step, left=step.left * mask)
            expected = real.quadratic(nu)
            tolerance = 2 * (real.quadratic(nu, at=step.stream + EPSILON * step.right * nu) - expected).abs()
            error = (measured[index] + expected / mask.sum(1)).abs()
            assert (error <= (tolerance + rounding(step, nu)) / mask.sum(1)).all(), index


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2", "bert"])
def test_bfloat16_measures_the_trace_of_float32(name: str) -> None:
    """With the default ε of each dtype and 64 probes, bfloat16 traces are the float32 ones up to a quarter."""
    given, measured = families.inputs(name), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = families.build(name)
        model.get_input_embeddings().weight.data /= 0.15  # σ ≈ 1, as in trained models behind the first layers
        with ofa.fused_regularizers(model.to(dtype), 0.0, 1.0, samples=64) as reg, torch.no_grad(), reg.measuring():
            model(**given)
            measured[dtype] = reg.measurements.traces
    assert measured[torch.bfloat16].dtype == torch.float32
    # ε = 0.1 moves a token by a tenth of its length, where branches bend by about as much; the roundings of 2⁻⁹ weigh
    # 2⁻⁹/ε = 2 % each in an entry of Δ/ε and average out.
    error = (measured[torch.bfloat16] - measured[torch.float32]).norm()
    assert error <= 0.25 * measured[torch.float32].norm()
