"""`every=k`: the sharpness is measured in one optimizer step of k, and its last gradient is used in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ofa
from tests import families
from tests.ofa.traces import built, scale_gradients

KINDS = {"exact": {}, "hutchinson": {"estimator": "hutchinson"}}


def tuned() -> Any:
    """A llama with tuned norms, and a stream short enough that no softplus is flat."""
    model = built("llama")
    model.get_input_embeddings().weight.data *= 10
    return model


def train(model: nn.Module, reg: ofa.Regularizers, steps: int, accumulation: int = 1) -> list[list[dict[str, Tensor]]]:
    """The penalty's gradient of every pass of every optimizer step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for step in range(steps):
        found.append([])
        for part in range(accumulation):
            given = families.inputs("llama", seed=step * accumulation + part)
            loss = model(**given).loss / accumulation
            found[-1].append(scale_gradients(model, reg.penalty()))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit-identical."""
    return one.keys() == other.keys() and all(torch.equal(one[path], other[path]) for path in one)


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_of_every_three_is_measured(kind: str) -> None:
    """Steps 0, 3 and 6 are measured; the others have exactly the gradient of the last of them."""
    model = tuned()
    with ofa.fused_regularizers(model, 0.0, 1.0, every=3, **KINDS[kind]) as reg:
        found = [passes[0] for passes in train(model, reg, 7)]
    assert [index for index in range(1, 7) if not same(found[index], found[index - 1])] == [3, 6]
    assert all(float(gradient.abs().max()) > 0 for gradient in found[0].values())
    other = tuned()
    with ofa.fused_regularizers(other, 0.0, 1.0, **KINDS[kind]) as reg:
        assert same(train(other, reg, 1)[0][0], found[0])


def test_passes_in_between_have_the_mean_of_those_that_were_measured() -> None:
    """With accumulation, the sum over a step equals the measured step's; the value is their mean too."""
    model, values = tuned(), []
    with ofa.fused_regularizers(model, 0.0, 1.0, every=2) as reg:
        whole = reg.penalty

        def penalty() -> Tensor:
            values.append(whole().item())
            return whole()

        reg.penalty = penalty  # type: ignore[method-assign]
        measured, between, again = train(model, reg, 3, accumulation=4)
    for path in measured[0]:
        mean = torch.stack([one[path] for one in measured]).mean(0)
        for one in between:
            # A sum of four and its quarter in float32.
            torch.testing.assert_close(one[path], mean, rtol=1e-6, atol=1e-6 * float(mean.abs().max()))
    assert values[4:8] == pytest.approx([sum(values[:4]) / 4] * 4, rel=1e-6)
    assert not same(measured[0], measured[1])
    assert not any(same(*pair) for pair in zip(again, measured, strict=True))


def test_the_step_ratio_is_measured_in_every_pass() -> None:
    """A pass in between has no traces and the last sharpness."""
    model = tuned()
    with ofa.fused_regularizers(model, 1.0, 1.0, every=2) as reg:
        model(**families.inputs("llama"))
        first = reg.measurements
        with torch.no_grad():
            model.model.norm.weight.mul_(1.1)
            model.model.layers[0].input_layernorm.weight.mul_(1.1)
        model(**families.inputs("llama", seed=9))
        second = reg.measurements
    assert first.traces is not None
    assert second.traces is None
    assert torch.equal(second.sharpness, first.sharpness)
    assert not torch.equal(second.step_norms, first.step_norms)
    torch.testing.assert_close(reg.penalty(), second.step_ratio + first.sharpness)


def test_evaluation_in_between_is_exact_and_changes_nothing() -> None:
    """`measuring()` measures in every step."""
    found = []
    for evaluating in (False, True):
        model = tuned()
        with ofa.fused_regularizers(model, 0.0, 1.0, every=2) as reg:
            passes = train(model, reg, 1)
            if evaluating:
                with torch.no_grad(), reg.measuring():
                    model(**families.inputs("llama", seed=9))
                    assert reg.measurements.traces.isfinite().all()
            found.append([one for step in (*passes, *train(model, reg, 2)) for one in step])
    assert all(same(*pair) for pair in zip(*found, strict=True))


def test_passes_before_the_optimizer_steps_are_all_measured() -> None:
    """Micro-batches belong to one step until the optimizer steps, so all of them are measured."""
    model = tuned()
    with ofa.fused_regularizers(model, 0.0, 1.0, every=4) as reg:
        for seed in range(6):
            model(**families.inputs("llama", seed=seed))
            assert reg.measurements.traces is not None


def test_a_resumed_schedule_continues() -> None:
    """The held value and the step count are enough to resume."""
    model = tuned()
    with ofa.fused_regularizers(model, 0.0, 1.0, every=3) as reg:
        train(model, reg, 2)
        value, gradients = reg.schedule.held()
    with ofa.fused_regularizers(model, 0.0, 1.0, every=3) as reg:
        reg.schedule.resume(2, value, gradients)
        third, fourth = (passes[0] for passes in train(model, reg, 2))
    assert all(torch.equal(third[path], gradient) for path, (_, gradient) in zip(third, gradients, strict=True))
    assert not same(third, fourth)
