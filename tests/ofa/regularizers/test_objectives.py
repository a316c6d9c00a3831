"""J, H and the penalty against plain loops, and the properties that training needs."""

from __future__ import annotations

import math

import pytest
import torch

from ofa.regularizers.objectives import (
    Measurements,
    penalty,
    ratios,
    sharpness,
    sharpness_slopes,
    step_norms,
    step_ratio,
    with_gradients,
)
from tests.device import DEVICE

STEPS, SEQUENCES = 5, 4


def squared_norms():
    """Of T steps and B sequences, over three orders of magnitude."""
    drawn = torch.rand(STEPS, SEQUENCES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 10 ** (3 * drawn.to(DEVICE))


def traces():
    """Of both signs and large enough for softplus to bend."""
    drawn = torch.randn(STEPS, SEQUENCES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return 3 * drawn.to(DEVICE)


def softplus(value):
    return math.log1p(math.exp(value))


def sharpness_of(values):
    return float(sharpness(values))


def test_step_ratio_is_the_sum_of_ratios_averaged_over_sequences():
    squared = squared_norms()
    total = 0.0
    for b in range(SEQUENCES):
        for t in range(1, STEPS):
            total += math.sqrt(squared[t, b]) / math.sqrt(squared[t - 1, b])
    actual = ratios(step_norms(squared))
    assert actual.shape == (STEPS - 1, SEQUENCES)
    assert float(step_ratio(actual)) == pytest.approx(total / SEQUENCES, rel=1e-12)


def test_sharpness_is_the_sum_of_softplus_averaged_over_sequences():
    total = 0.0
    for b in range(SEQUENCES):
        for t in range(STEPS):
            total += softplus(traces()[t, b])
    assert sharpness_of(traces()) == pytest.approx(total / SEQUENCES, rel=1e-12)


def test_softplus_comes_before_the_mean_over_sequences():
    """If the mean were taken first, sequences of opposite sign would cancel."""
    opposite = torch.tensor([-8.0, 8.0], dtype=torch.float64, device=DEVICE)
    expected = (softplus(-8.0) + softplus(8.0)) / 2
    assert expected > 5 * softplus(0.0)
    assert float(sharpness(opposite.unsqueeze(0))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_split_batch_has_the_same_objective(cut):
    """Gradient accumulation and data parallelism average over parts, weighted by their sequences."""

    def objectives(columns):
        part = slice(*columns)
        return float(step_ratio(ratios(step_norms(squared_norms()[:, part])))), sharpness_of(traces()[:, part])

    whole = objectives((0, SEQUENCES))
    first, second = objectives((0, cut)), objectives((cut, SEQUENCES))
    averaged = [(cut * a + (SEQUENCES - cut) * b) / SEQUENCES for a, b in zip(first, second, strict=True)]
    assert averaged == pytest.approx(whole, rel=1e-12)


def test_only_sequences_with_a_real_token_are_averaged():
    """Values of other rows do not matter; a batch without any sequence gives 0, not 0/0."""
    real = torch.tensor([True, False, True, False], device=DEVICE)
    spoiled = torch.where(real, traces(), float("nan"))
    assert float(sharpness(spoiled, real)) == pytest.approx(sharpness_of(traces()[:, real]), rel=1e-12)
    moved = ratios(step_norms(squared_norms()))
    expected = float(step_ratio(moved[:, real]))
    assert float(step_ratio(torch.where(real, moved, float("nan")), real)) == pytest.approx(expected, rel=1e-12)
    assert float(sharpness(traces(), torch.zeros_like(real))) == 0.0


@pytest.mark.parametrize("masked", [False, True])
def test_slopes_are_the_derivative_of_the_sharpness(masked):
    """Step by step, as a pass computes them; 0 for sequences without a real token."""
    real = torch.tensor([True, False, True, True], device=DEVICE) if masked else None
    values = traces().requires_grad_()
    (expected,) = torch.autograd.grad(sharpness(values, real), values)
    found = torch.stack([sharpness_slopes(row, real) for row in traces()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_where_softplus_is_flat_its_slope_is_zero():
    """e⁻⁹⁰ would be a denormal float32, which makes CPU products ten times slower."""
    assert sharpness_slopes(torch.tensor([-90.0, -31.0, 90.0], device=DEVICE)).tolist() == pytest.approx([0, 0, 1 / 3])


def test_a_value_with_known_gradients_returns_them():
    """Times the incoming gradient, also twice; in no_grad it is the value itself."""
    scale, known = torch.ones(3, device=DEVICE, requires_grad=True), torch.arange(3.0, device=DEVICE)
    value = with_gradients(torch.tensor(2.5, device=DEVICE), [(scale, known)])
    assert value.item() == 2.5
    (2 * value + value).backward()
    assert torch.equal(scale.grad, 3 * known)
    with torch.no_grad():
        assert not with_gradients(torch.tensor(2.5, device=DEVICE), [(scale, known)]).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("still", range(3))
def test_an_update_of_zero_has_a_finite_gradient(dtype, still):
    """A branch that adds nothing (a dead layer, a zero initialization) must not turn every γ into NaN."""
    squared = torch.full((3, 2), 1e6, dtype=dtype, device=DEVICE)
    squared[still, 0] = 0.0
    squared.requires_grad_()
    value = step_ratio(ratios(step_norms(squared)))
    (gradient,) = torch.autograd.grad(value, squared)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("measured", "expected"),
    [({}, 0.0), ({"step_ratio": 2.0}, 0.2), ({"sharpness": 3.0}, 0.9), ({"step_ratio": 2.0, "sharpness": 3.0}, 1.1)],
    ids=["nothing", "step ratio", "sharpness", "both"],
)
def test_penalty_weighs_what_was_measured(measured, expected):
    tensors = {name: torch.tensor(value, device=DEVICE) for name, value in measured.items()}
    value = penalty(Measurements(**tensors), 0.1, 0.3, torch.device(DEVICE))
    assert value.dtype == torch.float32
    assert value.shape == ()
    # Two products and a sum in float32.
    assert float(value) == pytest.approx(expected, rel=3 * torch.finfo(torch.float32).eps)


def test_penalty_reaches_both_terms_with_its_gradient():
    terms = torch.tensor([2.0, 3.0], requires_grad=True, device=DEVICE)
    penalty(Measurements(step_ratio=terms[0], sharpness=terms[1]), 0.1, 0.3, torch.device(DEVICE)).backward()
    assert terms.grad.tolist() == pytest.approx([0.1, 0.3])
