"""Relative steps are Adam's on δ in γ = γ₀(1 + δ)."""

from __future__ import annotations

import pytest
import torch

import ofa
from ofa.errors import InputError
from tests.families import build, inputs

OPTIONS = {"lr": 1e-2, "weight_decay": 0.0, "eps": 1e-300}
"""Adam's ε is no number beside the gradients here, so that its steps do not depend on the unit of a parameter."""


def spread(model):
    """Scales of very different sizes, one of them 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index, scale in enumerate(ofa.tune_norms(model)):
            scale.copy_(torch.rand(scale.shape, generator=generator, dtype=scale.dtype) * 10.0**-index + 1e-4)
            scale[3] = 0
    state = model.state_dict()
    ofa.restore_norms(model)
    model.load_state_dict(state)


def loss(model, name):
    return model(**inputs(name)).logits.double().square().mean()


@pytest.mark.parametrize(("name", "offset"), [("llama", 0.0), ("gemma2", 1.0)])
def test_the_steps_are_those_of_adam_on_the_relative_change(name, offset):
    """Float64; Gemma's scale is 1 + w; a channel at 0 moves as if it had a thousandth of its norm's mean."""
    model = build(name).double()
    spread(model)
    scales = ofa.tune_norms(model)
    start = [scale.detach().clone() for scale in scales]
    optimizer = torch.optim.AdamW(scales, **OPTIONS)
    ofa.relative_steps(optimizer, model)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, name).backward()
        optimizer.step()
    moved = [scale.detach().clone() for scale in scales]

    sizes = [(value + offset).abs() for value in start]
    sizes = [size.clamp_min(1e-3 * size.mean()) for size in sizes]
    changes = [torch.zeros_like(value, requires_grad=True) for value in start]
    reference = torch.optim.AdamW(changes, **OPTIONS)
    for _ in range(3):
        with torch.no_grad():
            for scale, value, size, change in zip(scales, start, sizes, changes, strict=True):
                scale.copy_(value + size * change)
                scale.grad = None
        loss(model, name).backward()
        for scale, size, change in zip(scales, sizes, changes, strict=True):
            change.grad = scale.grad * size
        reference.step()
    for got, value, size, change in zip(moved, start, sizes, changes, strict=True):
        torch.testing.assert_close(got, value + size * change.detach(), rtol=1e-9, atol=1e-13)


def test_a_second_call_changes_no_step():
    """Run twice, as a cell of a notebook is, it does not scale the steps twice."""
    moved = []
    for calls in (1, 2):
        model = build("llama")
        spread(model)
        scales = ofa.tune_norms(model)
        optimizer = torch.optim.SGD(scales, lr=0.5)
        for _ in range(calls):
            ofa.relative_steps(optimizer, model)
        loss(model, "llama").backward()
        optimizer.step()
        moved.append(scales[0].detach().clone())
    assert torch.equal(*moved)


def test_an_optimizer_made_before_tune_norms_is_refused():
    """It would train nothing: `tune_norms` makes new parameters."""
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    ofa.tune_norms(model)
    with pytest.raises(InputError, match="the optimizer holds none of the tuned norm scales: make it after tune_norms"):
        ofa.relative_steps(optimizer, model)


def test_other_parameters_keep_their_steps_and_remove_ends_it():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.fill_(0.25)
    scales = ofa.tune_norms(model)
    other = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*scales, other], lr=0.5)
    steps = ofa.relative_steps(optimizer, model)
    moved = []
    for removed in (False, True):
        if removed:
            steps.remove()
        before = scales[0].detach().clone()
        scales[0].grad, other.grad = torch.ones_like(scales[0]), torch.ones_like(other)
        optimizer.step()
        moved.append(before - scales[0].detach())
    assert torch.equal(moved[0], torch.full_like(moved[0], 0.5 * 0.25))
    assert torch.equal(moved[1], torch.full_like(moved[1], 0.5))
    assert torch.equal(other.detach(), torch.zeros(3))


def test_a_model_whose_norms_are_not_tuned_is_refused():
    model = build("llama")
    with pytest.raises(InputError, match="not tuned; call tune_norms"):
        ofa.relative_steps(torch.optim.SGD(model.parameters(), lr=1.0), model)
