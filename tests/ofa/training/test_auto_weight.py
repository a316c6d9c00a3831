"""`sharpness="auto"`: in every step the sharpness's gradient is a fixed share of the loss's, in relative units."""

from __future__ import annotations

import pytest
import torch

from ofa import InputError
from ofa.training.auto_weight import AutoWeight
from ofa.training.config import SHARE, TrainingConfig
from tests.ofa.training.test_loop import PLAIN, run

AUTO = {**PLAIN, "sharpness": "auto"}


@pytest.mark.parametrize("relative", [True, False])
def test_the_added_gradient_has_its_share_of_the_length(relative):
    """Two parameters, one of them with a unit; two micro-batches."""
    drawn = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(5, generator=drawn)) for _ in range(2)]
    size = torch.rand(5, generator=drawn)
    auto = AutoWeight(parameters, {parameters[0]: size} if relative else {})
    for _ in range(2):
        value = sum(parameter.pow(3).sum() for parameter in parameters)
        auto.pull(0.5 * value)
        sum(parameter.square().sum() for parameter in parameters).backward()
    own = [4 * parameter.detach() for parameter in parameters]
    weight = auto.add()
    added = [parameter.grad - one for parameter, one in zip(parameters, own, strict=True)]
    units = [size if relative else torch.ones(5), torch.ones(5)]
    lengths = [torch.cat([unit * one for unit, one in zip(units, parts, strict=True)]).norm() for parts in (added, own)]
    assert float(lengths[0] / lengths[1]) == pytest.approx(SHARE, rel=1e-5)
    for one, parameter in zip(added, parameters, strict=True):
        torch.testing.assert_close(one, weight * 3 * parameter.detach() ** 2)


def test_a_term_without_a_gradient_adds_nothing():
    """Softplus is flat where every trace is very negative."""
    parameter = torch.nn.Parameter(torch.ones(3))
    auto = AutoWeight([parameter], {})
    auto.pull((0 * parameter).sum())
    parameter.sum().backward()
    assert auto.add() == 0
    assert parameter.grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize("step_ratio", [0.0, 0.1])
def test_accumulation_changes_neither_the_weight_nor_the_scales(tiny_model, step_ratio):
    """The weight is of a whole optimizer step."""
    runs = [
        run(tiny_model, settings={**AUTO, "step_ratio": step_ratio, "batch_size": size, "accumulation": count})
        for size, count in ((4, 1), (2, 2))
    ]
    (first, scales), (second, others) = runs
    for one, other in zip(first.records, second.records, strict=True):
        assert one.penalty == pytest.approx(other.penalty, rel=1e-4)
        assert one.sharpness == pytest.approx(other.sharpness, rel=1e-4)
    for name, value in scales.items():
        torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-4)


def test_a_resumed_run_ends_at_the_same_bits(tiny_model, tmp_path):
    """The weight has no state of its own."""
    _, expected = run(tiny_model, settings=AUTO)

    def stop(record, total):
        if record.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, settings=AUTO, folder=tmp_path, progress=stop)
    _, scales = run(tiny_model, settings=AUTO, folder=tmp_path, resume=True)
    assert all(torch.equal(scales[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("often", "a number or 'auto', not 'often'"),
        (-1, "greater than or equal to 0"),
        (float("nan"), "a finite number"),
    ],
    ids=str,
)
def test_other_weights_are_refused(weight, message):
    with pytest.raises(InputError, match=f"sharpness must be {message}"):
        TrainingConfig(sharpness=weight)
