"""The estimate by probes against dense Jacobians of `tests.oracle`, in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ofa
from tests import families, oracle
from tests.cases import over_pairs
from tests.ofa.traces import frozen, own_token_trace, probes_of, spread, trace_gradients, traces_of

EPSILON = 1e-7
DENSE = ["llama", "gpt2", "gemma3", "olmo2", "falcon_two_norms", "bert"]
"""One family per wiring; dense Jacobians of the others would add nothing."""


GRADIENTS = ("preconditioner", "full")

LAYERS = [("llama", "layer"), ("gpt2", "layer"), ("olmo2", "layer"), ("bert", "layer"), ("opt_post_norm", "layer")]


def measure(name: str, given: dict[str, Tensor], *, passes: int = 1, **options: Any) -> Tensor:
    """Measured traces h_t, (passes, steps, sequences)."""
    settings = {"step_ratio": 0.0, "sharpness": 1.0, "estimator": "hutchinson", "epsilon": EPSILON, **options}
    model = oracle.model(name)
    traces = []
    with ofa.fused_regularizers(model, **settings) as reg, torch.no_grad(), reg.measuring():
        for _ in range(passes):
            model(**given)
            traces.append(reg.measurements.traces)
    return torch.stack(traces)


def held(dense: Tensor, step: oracle.OracleStep) -> Tensor:
    """Γ J/σ of one sequence, (T, d, T, d), from J P; probes without γ measure its quadratic forms."""
    return step.scale.view(1, -1, 1, 1) * dense / step.scale


def rounding(step: oracle.OracleStep, nu: Tensor) -> Tensor:
    """Rounding of νᵀΔ/ε: a few dozen roundings of 2⁻⁵³ in each output."""
    size = (nu * step.left.unsqueeze(-1) * (step.function(step.stream).abs() + step.stream.abs())).abs().sum((1, 2))
    return 64 * 2**-53 * size.detach() / EPSILON


# Every wiring; test_attach covers each family's arguments.
@pytest.mark.parametrize(("name", "granularity"), [*((name, "sublayer") for name in DENSE), *LAYERS])
def test_the_estimate_is_the_quadratic_form_of_its_own_probes(name: str, granularity: str) -> None:
    """gradient="full": h_t = −(1/n) νᵀ J_t P_t ν, with the ν that the Philox key gives."""
    with oracle.Float64():
        given = oracle.batch(name)
        measured = measure(name, given, granularity=granularity, seed=5, gradient="full")[0]
        steps = oracle.steps(name, oracle.model(name), given, granularity)
        assert len(measured) == len(steps)
        for index, step in enumerate(steps):
            nu = probes_of(index, step.stream, seed=5, samples=1)[0]
            expected = step.quadratic(nu)
            # The finite difference is the mean of νᵀJPν along the displacement, and so between its extremes.
            moved = step.quadratic(nu, at=step.stream + EPSILON * step.right * nu)
            tolerance = 2 * (moved - expected).abs() + rounding(step, nu)
            tokens = step.stream.shape[1]
            error = (measured[index] + expected / tokens).abs()
            assert (error <= tolerance / tokens).all(), (index, error, tolerance / tokens)
            # The tolerance must detect a wrong P or σ.
            assert (tolerance <= 1e-2 * (1 + expected.abs())).all()


@pytest.mark.parametrize(("name", "granularity"), oracle.CASES)
def test_value_and_gradient_are_the_products_of_its_own_probes(name: str, granularity: str) -> None:
    """gradient="preconditioner", each family and granularity: ∂h_t/∂γ = −(2/n) Σ_i ν_i ⊙ (J ν/σ)_i, h_t = ½γ·∂h_t/∂γ.

    Branches are run again outside the model, in every wiring.
    """
    options = {"estimator": "hutchinson", "epsilon": EPSILON, "granularity": granularity, "seed": 5, "samples": 2}
    with oracle.Float64():
        model, given = frozen(name), oracle.batch(name)
        steps = oracle.steps(name, model, given, granularity)
        measured, gradients = traces_of(model, given, **options), trace_gradients(model, given, **options)
        paths = {module: path for path, module in model.named_modules()}
        assert len(measured) == len(steps)
        for index, step in enumerate(steps):
            value: Any = 0.0
            for part in step.parts or (step,):
                probes = probes_of(index, step.stream, seed=5, samples=2)
                wanted = -2 * torch.stack([part.diagonal(nu) for nu in probes]).mean(0) / step.stream.shape[1]
                value = value + wanted @ part.scale / 2
                # Curvature: ε = 10⁻⁷ times up to 10⁴; rounding: 10⁻⁹ times updates of 10².
                close = {"rtol": 1e-3, "atol": 1e-3}
                torch.testing.assert_close(gradients[paths[part.norm]], wanted.mean(0), **close)
            torch.testing.assert_close(measured[index], value, **close)


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


@over_pairs(name=DENSE, probe=["rademacher", "gaussian"], gradient=GRADIENTS)
def test_the_mean_over_many_probes_is_the_dense_trace(name: str, probe: str, gradient: str) -> None:
    """Unbiased: 400 probes of either distribution are within 3.5 standard errors of −tr(J P)/n."""
    samples = 400
    with oracle.Float64():
        given = oracle.batch(name, sequences=1)
        measured = measure(name, given, samples=samples, probe=probe, gradient=gradient)[0, :, 0]
        for index, step in enumerate(oracle.steps(name, oracle.model(name), given, "sublayer")):
            dense = step.dense(0)
            error = float(measured[index]) + own_token_trace(dense)
            if gradient == "preconditioner" and step.parts:
                dense = sum(held(part.dense(0), part) for part in step.parts)
            elif gradient == "preconditioner":
                dense = held(dense, step)
            # 3.5 and not 3: some forty values are compared.
            assert abs(error) <= 3.5 * spread(dense, probe, len(dense)) / math.sqrt(samples), index


@pytest.mark.parametrize("name", [name for name in DENSE if name != "bert"])
def test_the_mean_gradient_over_many_probes_is_the_exact_one(name: str) -> None:
    """Unbiased in every channel: ‖ĝ − g‖ is within 3 standard deviations, which are known exactly."""
    samples, given, model = 400, oracle.batch(name, sequences=1), frozen(name)
    with oracle.Float64():
        exact = trace_gradients(model, given)
        found = trace_gradients(model, given, estimator="hutchinson", samples=samples, epsilon=EPSILON, seed=2)
        paths = {module: path for path, module in model.named_modules()}
        variances: dict[str, Tensor] = {}
        for step in oracle.steps(name, model, given, "sublayer"):
            for part in step.parts or (step,):
                matrix = (part.dense(0) / part.scale).detach()
                own = matrix.diagonal(dim1=1, dim2=3)  # (T, T, d): channel k of one token by channel k of another
                # νᵀQν with the rows (i, k) of `matrix` has the variance ‖Q‖² + Σ Q ∘ Qᵀ − 2 Σ Q_ii² (Rademacher).
                rows = matrix.square().sum((0, 2, 3)) + (own * own.transpose(0, 1)).sum((0, 1))
                variance = rows - 2 * own.diagonal(dim1=0, dim2=1).square().sum(-1)
                variances[paths[part.norm]] = 4 * variance / len(matrix) ** 2
    for path, variance in variances.items():
        error = float((found[path] - exact[path]).norm())
        assert error <= 3 * math.sqrt(float(variance.sum()) / samples), path


@pytest.mark.parametrize("samples", [1, 8, 64])
def test_the_error_falls_with_the_square_root_of_the_probes(samples: int) -> None:
    """At a fixed budget N the error has the standard deviation σ/√N, σ from the dense Jacobian; no early stopping."""
    passes = 20
    with oracle.Float64():
        given = oracle.batch("llama", sequences=1)
        measured = measure("llama", given, passes=passes, samples=samples, seed=samples)[..., 0]
        scores = []
        for index, step in enumerate(oracle.steps("llama", oracle.model("llama"), given, "sublayer")):
            dense = held(step.dense(0), step)
            errors = measured[:, index] + own_token_trace(dense)
            scores.append(errors * math.sqrt(samples) / spread(dense, "rademacher", len(dense)))
    squares = torch.stack(scores).square()
    # The mean of M squares with mean 1 deviates by √((κ − 1)/M); a quadratic form has κ ≤ 3 + 12/N (one direction).
    deviation = math.sqrt((2 + 12 / samples) / squares.numel())
    assert abs(float(squares.mean()) - 1) <= 3 * deviation


@pytest.mark.parametrize("granularity", ["sublayer", "layer"])
def test_the_conventions_differ_only_in_sign(granularity: str) -> None:
    """`convention="algorithm1"` is exactly the negative of the theory's."""
    given = oracle.batch("llama")
    theory = measure("llama", given, granularity=granularity, convention="theory")
    assert torch.equal(measure("llama", given, granularity=granularity, convention="algorithm1"), -theory)
    assert (theory != 0).all()


def test_more_samples_are_the_mean_of_single_ones() -> None:
    """`samples=N` averages the estimates of the probes numbered 0 … N − 1."""
    with oracle.Float64():
        given = oracle.batch("gpt2")
        measured = measure("gpt2", given, samples=3, gradient="full")[0]
        step = oracle.steps("gpt2", oracle.model("gpt2"), given, "sublayer")[2]
        nus = probes_of(2, step.stream, samples=3)
        each = torch.stack([step.quadratic(nu) for nu in nus])
    assert not torch.equal(nus[0], nus[1])
    # Each of the three finite differences is within 1e-2 of its limit, see the first test.
    torch.testing.assert_close(measured[2], -each.mean(0) / 5, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("estimator", ["auto", "hutchinson"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon_alibi", "bert"])
def test_attention_implementations_agree(name: str, estimator: str) -> None:
    """Eager attention has other arguments (Falcon's alibi), which copies need too: the traces are the same."""
    measured = []
    for implementation in ("eager", "sdpa"):
        model = families.build(name).double()
        model.set_attn_implementation(implementation)
        with oracle.Float64():
            measured.append(traces_of(model.requires_grad_(False), oracle.batch(name), estimator=estimator))
    # Other orders of summing, 2⁻⁵³ each, magnified 10⁵ times by the default ε of float64 and by updates of size 10².
    torch.testing.assert_close(*measured, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padding_enters_neither_the_trace_nor_its_mean(padding_side: str, gradient: str) -> None:
    """With an attention mask the trace is the own-token sum over real tokens, divided by their number."""
    with oracle.Float64():
        given = oracle.batch("llama")
        mask = torch.ones_like(given["input_ids"])
        mask[1, slice(3, None) if padding_side == "right" else slice(None, 2)] = 0
        given = {**given, "attention_mask": mask}
        measured = measure("llama", given, gradient=gradient)[0]
        for index, step in enumerate(oracle.steps("llama", oracle.model("llama"), given, "sublayer")):
            nu = probes_of(index, step.stream, samples=1)[0]
            real = dataclasses.replace(step, left=step.left * mask)
            expected = real.quadratic(nu) if gradient == "full" else real.diagonal(nu) @ step.scale
            # As for the estimates of a batch without padding.
            torch.testing.assert_close(measured[index], -expected / mask.sum(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2", "bert"])
def test_bfloat16_measures_the_trace_of_float32(name: str, gradient: str) -> None:
    """With the default ε of each dtype and 64 probes, bfloat16 traces are the float32 ones up to a quarter."""
    given, measured = families.inputs(name), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = families.build(name)
        model.get_input_embeddings().weight.data /= 0.15  # σ ≈ 1, as in trained models after the first layers
        options = {"estimator": "hutchinson", "samples": 64, "gradient": gradient}
        measured[dtype] = traces_of(model.to(dtype), given, **options)
    assert measured[torch.bfloat16].dtype == torch.float32
    # ε = 0.1 moves a token by a tenth of its length, with a curvature error of the same order; roundings of 2⁻⁹ give
    # 2⁻⁹/ε = 2 % in each entry of Δ/ε and average out.
    error = (measured[torch.bfloat16] - measured[torch.float32]).norm()
    assert error <= 0.25 * measured[torch.float32].norm()


def test_copies_leave_no_graph_and_no_hook_sees_them() -> None:
    """gradient="preconditioner": each branch is run once more per pass, on N batches, without hooks and in no_grad."""
    model, given, seen = frozen("llama"), oracle.batch("llama"), []
    mlp = model.model.layers[1].mlp
    own, handle = mlp.forward, mlp.register_forward_hook(lambda *_: seen.append("hook"))
    mlp.forward = lambda hidden: (seen.append((len(hidden), torch.is_grad_enabled())), own(hidden))[1]
    try:
        with ofa.fused_regularizers(model, 0.0, 1.0, estimator="hutchinson", samples=3, epsilon=EPSILON):
            model(**given)
    finally:
        del mlp.forward
        handle.remove()
    assert seen == [(2, True), "hook", (6, False)]
