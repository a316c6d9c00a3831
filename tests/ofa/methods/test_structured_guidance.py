"""The guided gradient is the gradient of the documented objective; r, τ and s follow their definitions."""

from __future__ import annotations

import copy
import math
import statistics

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ofa.errors import InputError
from ofa.methods.structured_guidance import (
    DECAY,
    ExactGuidance,
    FirstOrderGuidance,
    Reference,
    Weights,
    check_attention,
    first_order_gradient,
    outer_gradient,
)
from ofa.tuning.norms import tune_norms
from tests.device import DEVICE

ALL = Weights(direction=1.0, magnitude=0.5)
VARIANTS = (ExactGuidance, FirstOrderGuidance)


def vectors(count, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64)


class Problem:
    """A tiny model's norm scales in float64, and losses of random texts of its vocabulary."""

    def __init__(self, model):
        self.model = model.double()
        self.parameters = tune_norms(model)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(3)  # a random model's curvature is small beside its gradient
            for scale in self.parameters:
                scale.add_(0.3 * torch.randn(scale.shape, generator=generator, dtype=scale.dtype).to(DEVICE))
        self.ids = torch.randint(3, 300, (9, 7), generator=generator).to(DEVICE)

    def loss(self, rows=slice(0, 4)):
        logits = self.model(input_ids=self.ids[rows, :-1], use_cache=False).logits[:, -1]
        return F.cross_entropy(logits, self.ids[rows, -1])

    def gradient(self, rows=slice(0, 4), **options):
        parts = torch.autograd.grad(self.loss(rows), self.parameters, **options)
        return torch.cat([part.flatten() for part in parts])

    def move(self, vector):
        with torch.no_grad():
            for scale, part in zip(self.parameters, vector.split([p.numel() for p in self.parameters]), strict=True):
                scale.add_(part)

    def guided(self, guidance):
        """The gradient of a guidance in its second step; an epoch has one, so that there is a τ."""
        guidance.begin(self.parameters, [lambda: self.loss(slice(0, 9))])
        guidance.backward(lambda: self.loss(slice(4, 8)))
        # Otherwise τ, the length of the first gradient, might lie above the second one's, with no magnitude term.
        guidance._threshold = 0.7 * float(self.gradient().norm())
        value = guidance.backward(self.loss)
        assert value == pytest.approx(self.loss().item(), rel=1e-12)
        return torch.cat([scale.grad.flatten() for scale in self.parameters])

    def reference(self):
        """r and τ of that second step, recomputed."""
        average = DECAY * self.gradient(slice(0, 9)) + (1 - DECAY) * self.gradient(slice(4, 8))
        return Reference(average, 0.7 * float(self.gradient().norm()))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=384, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    config._attn_implementation = "eager"
    return GPT2LMHeadModel(config).eval().to(DEVICE)


@pytest.fixture
def problem():
    """On a GPT-2, which is float64 throughout; a Llama's norms and softmax are float32 always.

    Its attention is eager since the oracles below differentiate twice by themselves.
    """
    return Problem(gpt2())


def written_out(gradient, reference, weights):
    """The added terms, directly from the formula."""
    unit, average = (v / v.norm() for v in (gradient, reference.average))
    excess = torch.relu(gradient.norm() - reference.threshold)
    return weights.direction * (1 - (unit * average).sum()) + weights.magnitude * excess**2


# The terms and u


@pytest.mark.parametrize("threshold", [1.0, 100.0], ids=["above τ", "below τ"])
@pytest.mark.parametrize("weights", [ALL, Weights(0.3, 0), Weights(0, 0.02)])
def test_u_is_the_gradient_of_the_terms(weights, threshold):
    """The closed form against autograd of the formula; both are float64."""
    gradient, average = vectors(2)
    reference = Reference(average, threshold)
    leaf = gradient.clone().requires_grad_()
    value = written_out(leaf, reference, weights)
    (expected,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(outer_gradient(gradient, reference, weights), expected, rtol=1e-12, atol=1e-15)


def test_direction_is_orthogonal_to_the_gradient_and_magnitude_is_parallel():
    gradient, average = vectors(2, size=1000)
    unit = gradient / gradient.norm()
    u = outer_gradient(gradient, Reference(average), Weights(1, 0))
    # A projection is orthogonal up to the rounding of its own dot product.
    assert abs(u @ unit) < 1e-14 * u.norm() * math.sqrt(1000)
    assert u.norm() > 0
    u = outer_gradient(gradient, Reference(average, 1.0), Weights(0, 1))
    torch.testing.assert_close(u, 2 * (gradient.norm() - 1) * unit)


def test_terms_without_reference_are_left_out():
    """No τ yet: only the direction."""
    gradient, average = vectors(2)
    only = outer_gradient(gradient, Reference(average), ALL)
    assert torch.equal(only, outer_gradient(gradient, Reference(average), Weights(ALL.direction, 0)))


@pytest.mark.parametrize("change", [outer_gradient, first_order_gradient])
def test_a_zero_gradient_stays_zero(change):
    """It has no direction; neither has a zero average."""
    (average,) = vectors(1)
    zero = torch.zeros_like(average)
    assert torch.equal(change(zero, Reference(average, 1.0), Weights(0.5, 1)), zero)
    assert change(average, Reference(zero), Weights(0.5, 1)).isfinite().all()


# The gradient of the whole objective


def test_exact_guidance_is_autograd_of_the_objective(problem):
    """L is written out with its gradient in the graph and differentiated as a whole; float64, hence 1e-9."""
    reference = problem.reference()
    gradient = problem.gradient(create_graph=True)
    whole = problem.loss() + written_out(gradient, reference, ALL)
    expected = torch.cat([p.flatten() for p in torch.autograd.grad(whole, problem.parameters)])
    guided = problem.guided(ExactGuidance(ALL))
    torch.testing.assert_close(guided, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    # The terms must not be negligible, or the check above would be vacuous.
    assert (guided - gradient.detach()).norm() > 0.1 * gradient.norm()


def test_exact_guidance_is_the_slope_of_the_objective(problem):
    """Central differences of L, which takes first derivatives alone: no second backward pass is trusted.

    At h = 1e-4 their truncation is h² times a third derivative of about the size of L' (1e-8), and rounding 1e-16/h.
    """
    reference = problem.reference()
    guided = problem.guided(ExactGuidance(ALL))
    for direction in (guided / guided.norm(), *vectors(2, size=guided.numel()).to(DEVICE) / math.sqrt(guided.numel())):
        values = []
        for step in (1e-4, -2e-4):
            problem.move(step * direction)
            values.append((problem.loss() + written_out(problem.gradient(), reference, ALL)).item())
        problem.move(1e-4 * direction)
        assert (values[0] - values[1]) / 2e-4 == pytest.approx(float(guided @ direction), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fused_attention_is_differentiated_twice_by_its_plain_path(tiny_model, family):
    """The default attention of a model has no second derivative on a CPU; the model's setting stays what it was."""
    model = tiny_model[0] if family == "llama" else gpt2()
    problem = Problem(model)
    model.set_attn_implementation("sdpa")
    guided = problem.guided(ExactGuidance(ALL))
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    expected = problem.guided(ExactGuidance(ALL))
    # Two ways to compute the same, in float64, but for a Llama's float32 norms and softmax.
    assert (guided - expected).norm() < (1e-5 if family == "llama" else 1e-12) * expected.norm()


def test_attention_without_second_derivative_is_refused(tiny_model):
    model = copy.deepcopy(tiny_model[0])
    check_attention(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match=r"'flash_attention_2' does not support.*guided-first-order"):
        check_attention(model)


# The first-order variant


def plane(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("gradient", "reference", "shares", "expected"),
    [
        # Against r = (2, 0): the part along it goes, the rest stays at its length.
        ((-3.0, 4.0), Reference(plane(2, 0)), Weights(0.5, 1), (0.0, 4.0)),
        # Half and half with r̂ = (0, 1) at length 5: (1.5, 4.5), back to length 5.
        ((3.0, 4.0), Reference(plane(0, 7)), Weights(0.5, 1), (1.5 / math.sqrt(22.5) * 5, 4.5 / math.sqrt(22.5) * 5)),
        # Share 0 is no mixing, and no projection either.
        ((-3.0, 4.0), Reference(plane(2, 0)), Weights(0, 1), (-3.0, 4.0)),
        # Clipped to τ = 2.5, or half of the way; below τ nothing happens.
        ((3.0, 4.0), Reference(plane(1, 0), 2.5), Weights(0, 1), (1.5, 2.0)),
        ((3.0, 4.0), Reference(plane(1, 0), 2.5), Weights(0, 0.5), (2.25, 3.0)),
        ((3.0, 4.0), Reference(plane(1, 0), 6.0), Weights(0, 1), (3.0, 4.0)),
        # In this order: r out of g leaves (0, -4), which is clipped.
        ((-3.0, -4.0), Reference(plane(2, 0), 1.0), Weights(0.5, 1), (0.0, -1.0)),
    ],
)
def test_first_order_changes_by_hand(gradient, reference, shares, expected):
    changed = first_order_gradient(plane(*gradient), reference, shares)
    torch.testing.assert_close(changed, plane(*expected), rtol=1e-14, atol=1e-14)


# State and log


class Bowl:
    """½ Σ k θ², whose gradient is kθ and whose Hessian is diag(k)."""

    def __init__(self):
        self.theta = torch.nn.Parameter(plane(1, 2))

    def loss(self, *curvature):
        return lambda: 0.5 * (plane(*curvature) * self.theta**2).sum()


@pytest.mark.parametrize("variant", VARIANTS)
def test_references_follow_their_definitions(variant):
    """r: EMA from the gradient on all shots; τ: median of ‖g‖ over the first epoch."""
    bowl = Bowl()
    guidance = variant(Weights(0.1, 0.1))
    guidance.begin([bowl.theta], [bowl.loss(1, 0), bowl.loss(0, 2)])
    assert torch.equal(guidance._average, plane(1, 4))
    seen = []

    def spy(loss, reference):
        seen.append(reference)
        return type(guidance)._guide(guidance, loss, reference)

    guidance._guide = spy
    steps = [(1, 0), (0, 1), (2, 2), (3, 0)]
    gradients, average = [], plane(1, 4)
    for index, curvature in enumerate(steps):
        theta = bowl.theta.detach().clone()
        guidance.backward(bowl.loss(*curvature))
        gradients.append(plane(*curvature) * theta)
        torch.testing.assert_close(seen[index].average, average, rtol=1e-14, atol=0)
        average = 0.9 * average + 0.1 * gradients[-1]
        with torch.no_grad():
            bowl.theta += 0.25
    threshold = statistics.median(float(g.norm()) for g in gradients[:2])
    assert [reference.threshold for reference in seen] == [None, None, threshold, threshold]
    notes = guidance.notes
    assert notes["gradient_norm"] == pytest.approx([float(g.norm()) for g in gradients], rel=1e-3)
    assert notes["gradient_norm_std"] == pytest.approx(statistics.pstdev(float(g.norm()) for g in gradients), rel=1e-3)
    assert notes["gradient_norm_threshold"] == pytest.approx(threshold, rel=1e-3)
    cosines = [float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(gradients[1:], gradients, strict=False)]
    assert notes["cosine_to_previous"][0] is None
    assert notes["cosine_to_previous"][1:] == pytest.approx(cosines, rel=1e-3)
    to_average = [float(F.cosine_similarity(g, r.average, dim=0)) for g, r in zip(gradients, seen, strict=True)]
    assert notes["cosine_to_average"] == pytest.approx(to_average, rel=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gradient_of_0_or_nan_is_passed_on(variant):
    """The trainer stops at NaN; at 0 the parameters stay."""
    bowl = Bowl()
    guidance = variant(Weights(0.1, 0.1))
    guidance.begin([bowl.theta], [bowl.loss(1, 1)])
    assert guidance.backward(bowl.loss(0, 0)) == 0
    assert torch.equal(bowl.theta.grad, plane(0, 0))
    assert guidance.steps[0].to_average == 0
    assert math.isnan(guidance.backward(bowl.loss(math.nan, 1)))
    assert not bowl.theta.grad.isfinite().all()


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_weights_must_be_numbers_from_0(value):
    with pytest.raises(InputError, match=r"setting magnitude=.* at least 0"):
        Weights(0.1, value)


def test_shares_are_at_most_1():
    with pytest.raises(InputError, match=r"direction=1.5 .* at most 1"):
        FirstOrderGuidance(Weights(1.5, 0))


# What it costs


@pytest.mark.parametrize(
    ("variant", "least", "most"),
    [
        (FirstOrderGuidance, 1.0, 1.0),
        # A product of frozen weights costs the same forward and backward, and each of them is gone through once more;
        # scores of attention have two factors that depend on θ, which makes it a little more.
        (ExactGuidance, 2.0, 2.1),
    ],
)
def test_the_cost_of_a_step(problem, variant, least, most):
    """In FLOPs of matrix products, against a step of norm tuning."""
    guidance = variant(Weights(0.1, 0.1))
    guidance.begin(problem.parameters, [lambda: problem.loss(slice(0, 9))])
    with FlopCounterMode(display=False) as plain:
        problem.gradient()
    with FlopCounterMode(display=False) as guided:
        guidance.backward(problem.loss)
    assert least <= guided.get_total_flops() / plain.get_total_flops() <= most
