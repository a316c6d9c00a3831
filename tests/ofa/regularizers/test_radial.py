"""The radial terms of training passes: through a few channels, through all of them, or left out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ofa
from ofa.regularizers.closed_form import branch_trace
from tests import oracle
from tests.ofa.traces import DENSE, frozen, scale_gradients, trace_gradients, traces_of

NAMES = ["llama", "gpt2", "falcon_two_norms", "gemma2", "gpt_oss"]
"""RMSNorm and LayerNorm with biases, parallel branches, a norm after the branch, experts."""


def measure(name: str, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Traces of a training pass, and their gradient by norm."""
    model, given = frozen(name), oracle.batch(name)
    settings = {"step_ratio": 0.0, "sharpness": 1.0, "estimator": "exact", **options}
    with oracle.Float64():
        with ofa.fused_regularizers(model, **settings) as reg:
            model(**given)
            traces = reg.measurements.traces.detach()
        return traces, trace_gradients(model, given, **options)


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """‖found − wanted‖/‖wanted‖ over all scales."""
    both = [torch.cat([one[path] for path in wanted]) for one in (found, wanted)]
    return float((both[0] - both[1]).norm() / both[1].norm())


@pytest.mark.parametrize("name", NAMES)
def test_all_channels_are_the_exact_term(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all channels chosen, traces and gradients equal those of "exact"."""
    exact = measure(name, radial="exact")
    own = branch_trace._channels

    def every(hat: Tensor, weights: Tensor, radial: str) -> Tensor:
        if radial == "exact":
            return own(hat, weights, radial)
        return torch.arange(hat.shape[-1], device=hat.device).flip(0).expand(len(hat), -1)

    monkeypatch.setattr(branch_trace, "_channels", every)
    found = measure(name, radial="channels")
    torch.testing.assert_close(found[0], exact[0], **DENSE)
    assert error(found[1], exact[1]) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_the_more_is_left_out_the_larger_the_error(name: str) -> None:
    """The 8 largest of 32 channels, and none."""
    exact, some, none = (measure(name, radial=radial) for radial in ("exact", "channels", "none"))
    assert 0 < error(some[1], exact[1]) < error(none[1], exact[1]) < 0.5


def test_a_few_massive_channels_are_nearly_all_of_it() -> None:
    """With three channels a hundred times as large as the others, the error is a fiftieth, not a seventh."""
    model, given = _massive(), oracle.batch("llama")
    with oracle.Float64():
        exact, some, none = (trace_gradients(model, given, radial=radial) for radial in ("exact", "channels", "none"))
    assert error(some, exact) < 0.03
    assert error(some, exact) < 0.2 * error(none, exact)


def _massive() -> nn.Module:
    model = copy.deepcopy(frozen("llama"))
    model.get_input_embeddings().weight.data[:, :3] *= 100
    return model


def test_a_branch_as_narrow_as_the_channels_has_it_exactly() -> None:
    """With at most 8 channels, all are chosen."""
    hat, weights = torch.randn(2, 5, 8), torch.rand(2, 5)
    assert branch_trace._channels(hat, weights, "channels").numel() == 0
    assert branch_trace._channels(torch.randn(2, 5, 9), weights, "channels").shape == (2, 8)


@pytest.mark.parametrize("radial", branch_trace.RADIAL)
def test_passes_that_are_not_trained_on_are_exact(radial: str) -> None:
    """In `measuring()`, and so in `ofa probe`, the trace is exact."""
    with oracle.Float64():
        found = traces_of(frozen("llama"), oracle.batch("llama"), radial=radial)
        expected = traces_of(frozen("llama"), oracle.batch("llama"), radial="exact")
    assert torch.equal(found, expected)


def test_channels_are_chosen_per_sequence() -> None:
    """A batch has the same channels as its sequences separately."""
    model, given = frozen("llama"), oracle.batch("llama")
    found = []
    for rows in (slice(None), slice(0, 1), slice(1, 2)):
        with oracle.Float64(), ofa.fused_regularizers(model, 0.0, 1.0, radial="channels") as reg:
            model(**{key: value[rows] for key, value in given.items()})
            found.append((reg.measurements.traces, scale_gradients(model, reg.penalty())))
    (whole, slopes), *alone = found
    torch.testing.assert_close(whole, torch.cat([traces for traces, _ in alone], 1), **DENSE)
    for path, slope in slopes.items():
        torch.testing.assert_close(slope, (alone[0][1][path] + alone[1][1][path]) / 2, **DENSE)
