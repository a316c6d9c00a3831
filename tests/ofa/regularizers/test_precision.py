"""Models in bfloat16 and float16, and autocast: outputs are unchanged, γ is float32 and trains as in float32."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import __version__ as transformers_version

import ofa
from ofa import anatomy
from ofa.regularizers.estimators import choice
from ofa.regularizers.estimators.hutchinson import DELTA, INT8_DELTA, FullHutchinson, Hutchinson, epsilon_scales
from tests import families, oracle
from tests.cases import POST_NORM
from tests.device import DEVICE
from tests.ofa.anatomy.test_families_dropin import EVERY, built, granularity_of
from tests.ofa.traces import traces_of

SCALE = 2.0**-8
"""Loss scale in float16, as by GradScaler: gradients of these random models exceed its largest number, 65504."""


@dataclass(frozen=True)
class Mode:
    """The dtype of a model, and that of autocast around it if there is any."""

    dtype: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def narrow(self) -> torch.dtype:
        """The dtype that branches compute in."""
        return self.autocast or self.dtype

    def context(self) -> AbstractContextManager[Any]:
        """Autocast on the tests' device, or nothing."""
        return nullcontext() if self.autocast is None else torch.autocast(DEVICE, dtype=self.autocast)


MODES = {
    "bfloat16": Mode(torch.bfloat16),
    "float16": Mode(torch.float16),
    "bfloat16 autocast": Mode(torch.float32, torch.bfloat16),
    "float16 autocast": Mode(torch.float32, torch.float16),
    "bfloat16 autocast over bfloat16": Mode(torch.bfloat16, torch.bfloat16),
}


def cast(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}


def gradient(model: nn.Module, name: str, given: dict[str, Tensor], mode: Mode) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a measured pass, its loss with the penalty, and the loss' gradient in every scale, in one row."""
    params = ofa.tune_norms(model)
    # Without a closed form only the step ratio: a finite difference's own error is larger than the dtype's.
    sharpness = 0.0 if name in POST_NORM else 1e-2
    # Roundings may change the channels chosen for the radial term.
    with ofa.fused_regularizers(model, 1e-2, sharpness, granularity=granularity_of(name), radial="exact") as reg:
        with mode.context():
            output = model(**given)
            loss = output.loss.float() + reg.penalty()
        (SCALE * loss).backward()
    assert all(param.dtype == param.grad.dtype == torch.float32 for param in params if param.grad is not None)
    return output.logits, loss.detach(), torch.cat([param.grad for param in params]) / SCALE


NARROW = ("bfloat16", "float16", "bfloat16 autocast")
EVERYWHERE = ("float16", "bfloat16 autocast")
"""Modes of every family: what overflows, or is cast by autocast, differs from class to class."""
CASES = [(name, mode) for mode in EVERYWHERE for name in EVERY]
CASES += [(name, mode) for mode in MODES if mode not in EVERYWHERE for name in ("llama", "gpt2", "gemma2", "vit")]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_narrow_dtypes_train_as_float32_does(name: str, mode: str) -> None:
    """Output dtype is kept; logits, loss, penalty and each scale's gradient equal float32's up to rounding."""
    if name.startswith("smolvlm") and "autocast" in mode and Version(transformers_version) < Version("5.18"):
        pytest.skip("under autocast, SmolVLM of transformers 5.17 fails by itself: it puts bfloat16 into float32")
    compare_with_float32(name, MODES[mode])


def compare_with_float32(name: str, mode: Mode) -> None:
    model, given = built(name)
    model = model.to(mode.dtype)
    plain = copy.deepcopy(model)
    # The rounded weights in float32, so that only the arithmetic differs.
    expected = gradient(copy.deepcopy(model).float(), name, given, Mode(torch.float32))
    given = cast(given, mode.dtype)
    with torch.no_grad(), mode.context():
        own = plain(**given).logits
    logits, loss, found = gradient(model, name, given, mode)
    unit = torch.finfo(mode.narrow).eps / 2
    # Three layers of about ten rounded operations, each amplified by a random model: the base's own distance
    # from float32 measures that, and a tuned norm rounds no more often than the base's.
    rounding = float((own.float() - expected[0]).norm())
    assert logits.dtype == own.dtype
    assert float((logits.float() - own.float()).norm()) <= 2 * rounding + 4 * unit * float(expected[0].norm())
    torch.testing.assert_close(loss, expected[1], rtol=32 * unit, atol=0)
    assert torch.isfinite(found).all()
    assert float((found - expected[2]).norm()) <= 64 * unit * float(expected[2].norm())


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("name", POST_NORM)
def test_the_fallback_of_auto_trains_in_narrow_dtypes(name: str, narrow: str) -> None:
    """Finite differences with the default ε: everything is finite, and each scale changes in a step of Adam."""
    mode, (model, given) = MODES[narrow], built(name)
    params = ofa.tune_norms(model.to(mode.dtype))
    start = [param.detach().clone() for param in params]
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)
    with ofa.fused_regularizers(model, 1e-2, 1e-2, granularity=granularity_of(name)) as reg, mode.context():
        loss = model(**cast(given, mode.dtype)).loss.float() + reg.penalty()
        (SCALE * loss).backward()
    assert reg.estimator == "hutchinson"
    assert torch.isfinite(loss)
    assert all(torch.isfinite(param.grad).all() for param in params if param.grad is not None)
    optimizer.step()
    assert all(float((p.detach() - old).abs().max()) > 5e-4 for p, old in zip(params, start, strict=True))


def steps_of(model: nn.Module) -> tuple[anatomy.Step, ...]:
    return anatomy.find(model).steps("sublayer")


def of_length(factor: float) -> nn.Module:
    """A llama whose stream is `factor` times as long, with the same norm outputs."""
    model = families.build("llama")
    model.get_input_embeddings().weight.data *= factor
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data *= factor
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0
    return model


def test_epsilon_scales_follow_the_length_of_the_stream_and_the_scales() -> None:
    """εPν = ε γ/σ ν is as long as a token of length σ for ε = σ²/γ."""
    short, long = (list(epsilon_scales(model, steps_of(model)).values()) for model in (of_length(1.0), of_length(10.0)))
    assert len(short) == 6
    assert [one.epsilon for one in long] == pytest.approx([100 * one.epsilon for one in short], rel=1e-4)
    model = of_length(1.0)
    for norm in anatomy.tuned_norms(model):
        model.get_parameter(f"{norm.path}.weight").data *= 4
    assert next(iter(epsilon_scales(model, steps_of(model)).values())).epsilon == pytest.approx(short[0].epsilon / 4)
    # A norm after its branch does not divide by the stream's length: the displacement is γν, not γ/σ ν.
    olmo2 = families.build("olmo2")
    before = list(epsilon_scales(olmo2, steps_of(olmo2)).values())
    olmo2.get_input_embeddings().weight.data *= 10
    assert next(iter(epsilon_scales(olmo2, steps_of(olmo2)).values())).epsilon == pytest.approx(
        10 * before[0].epsilon, rel=1e-3
    )


def test_finding_epsilon_scales_changes_nothing() -> None:
    model = families.build("gemma2").train()
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    epsilon_scales(model, steps_of(model))
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()] == hooks
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


LENGTHS = [(factor, dtype) for dtype in (torch.float32, torch.bfloat16) for factor in (0.1, 10.0, 1000.0)]
LENGTHS += [(0.1, torch.float16), (10.0, torch.float16)]  # float16 cannot hold a longer stream


@pytest.mark.parametrize("gradient", ["preconditioner", "full"])
@pytest.mark.parametrize(("factor", "dtype"), LENGTHS)
def test_the_default_step_suits_streams_of_any_length(
    factor: float, dtype: torch.dtype, gradient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each dtype the error is of order δ, for tokens as short as after the embeddings and as long as at the end."""
    model, given = of_length(factor), families.inputs("llama")
    scales = epsilon_scales(model, steps_of(model))
    monkeypatch.setattr(choice, "epsilon_scales", lambda *_: scales)
    narrow = copy.deepcopy(model).to(dtype)
    options = {"estimator": "hutchinson", "gradient": gradient, "samples": 4}
    found = traces_of(narrow, given, **options).double()
    with oracle.Float64():
        limit = traces_of(narrow.double(), given, **options)  # the same probes, with the smallest ε for float64
    # Curvature: F's slope changes by at most 5 δ in a random model; roundings are u/δ ≈ δ each,
    # and a few of them add up.
    assert float((found - limit).norm() / limit.norm()) <= 10 * DELTA[dtype]


class Linear8bitLt(nn.Linear):
    """A layer that by its name rounds its input to 8 bits."""


def test_quantized_layers_have_a_larger_epsilon() -> None:
    """The least δ of a branch is that of its coarsest layer: 8 bits, or 4 bits with bfloat16 arithmetic."""
    model = families.build("llama")
    model.model.layers[1].mlp.up_proj.__class__ = Linear8bitLt
    model.model.layers[2].self_attn.q_proj.compute_dtype = torch.bfloat16
    found = epsilon_scales(model, steps_of(model))
    assert [one.at_least for one in found.values()] == [0, 0, 0, INT8_DELTA, DELTA[torch.bfloat16], 0]
    branch = next(branch for branch, one in found.items() if one.at_least == INT8_DELTA)
    stream, first = torch.zeros(1, 4, 32, device=DEVICE), next(iter(found))
    # The displacement without γ is shorter by the root mean square of γ.
    for estimator, factors in (
        (FullHutchinson(scales=found), (1.0, 1.0)),
        (Hutchinson(scales=found), (found[branch].scale, found[first].scale)),
    ):
        for one, delta, factor in zip((branch, first), (INT8_DELTA, DELTA[torch.float32]), factors, strict=True):
            assert estimator._epsilon(one, stream) == pytest.approx(delta * found[one].epsilon * factor, rel=1e-12)
