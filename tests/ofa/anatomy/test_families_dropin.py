"""Every family, also with images: attach, three optimizer steps, close; then the model is unchanged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import ofa
from ofa.anatomy import steps as anatomy
from tests import families, oracle
from tests.cases import POST_NORM
from tests.device import DEVICE
from tests.ofa.traces import assert_dense, freeze, probes_of, solve, traces_of

# PEFT warns of every norm, and tunes it anyway.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")

BEHAVES_AS = {"llava": "llama", "qwen2_vl": "qwen2", "paligemma": "gemma", "gemma3": "gemma3", "smolvlm": "llama"}
"""The family of each vision-language model's language part."""

IMAGES = [f"{name} with images" for name in families.VISION_LANGUAGE]
EVERY = [*families.BUILDERS, *IMAGES]


def built(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of a family in float32, and a batch for it."""
    family = name.removesuffix(" with images")
    if name in IMAGES:
        return families.vision_language(family), families.images_and_text(family)
    return families.build(name), families.inputs(name)


def granularity_of(name: str) -> str:
    return "layer" if name in oracle.POST_NORM_LAYER else "sublayer"


def settings_of(config: Any) -> dict[str, Any]:
    """All settings of a configuration, including its parts and those that are not saved."""
    return {key: settings_of(value) if hasattr(value, "to_dict") else value for key, value in vars(config).items()}


def state_of(model: nn.Module) -> dict[str, Any]:
    """State that must be restored: objects, flags, hooks, modes, settings."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return copy.deepcopy(
        {
            "parameters": [(path, id(p), p.requires_grad, p.dtype, p.grad) for path, p in model.named_parameters()],
            "hooks": [[list(getattr(module, name)) for name in hooks] for module in model.modules()],
            "modes": [module.training for module in model.modules()],
            "attributes": [sorted(vars(module)) for module in model.modules()],
            "settings": [settings_of(config) for config in configs.values()],
        }
    )


# Every family: the one test of fitting, saving and taking out that goes through all of them.
@pytest.mark.parametrize("name", EVERY)
def test_three_steps_and_back(name: str, tmp_path: Path) -> None:
    """Each tuned scale changes in the first step; PEFT loads the saved adapter; the model is bit-identical afterwards.

    A vision-language model's norms are those of its language part: the others stay frozen and out of the adapter.
    """
    model, given = built(name)
    with torch.no_grad():
        plain = model(
            **given
        ).logits  # first: with labels, BERT and ViT write their problem type into the configuration
    base, before, values = copy.deepcopy(model), state_of(model), copy.deepcopy(model.state_dict())

    params = ofa.tune_norms(model)
    start = [param.detach().clone() for param in params]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)
    with ofa.fused_regularizers(model, 1e-2, 1e-3, granularity=granularity_of(name)) as reg:
        for _ in range(3):
            loss = model(**given).loss + reg.penalty()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert torch.isfinite(loss)
            # Adam changes every entry with a gradient by about the learning rate.
            assert all(
                float((param.detach() - old).abs().max()) > 5e-3 for param, old in zip(params, start, strict=True)
            ), "a scale has not moved"
    if name in IMAGES:
        language = anatomy._decoder(model)[0]
        assert [norm.path.startswith(f"{language}.") for norm in reg.anatomy.norms] == [True] * len(params)
    with torch.no_grad():
        tuned = model(**given).logits
    ofa.save_adapter(model, tmp_path / "adapter")
    ofa.restore_norms(model)

    assert state_of(model) == before
    assert all(torch.equal(value, values[path]) for path, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(**given).logits, plain)
        opened = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(opened(**given).logits, tuned)
    assert not torch.equal(tuned, plain)


def penalty_of(steps: list[oracle.OracleStep]) -> float:
    """J + H of the oracle's steps, with H from νᵀJPν for the probes of an `ofa` pass."""
    norms = oracle.step_norms(steps)
    forms = [step.quadratic(probes_of(i, step.stream, seed=5, samples=1)[0]) for i, step in enumerate(steps)]
    traces = -torch.stack(forms) / steps[0].stream.shape[1]
    ratio = (norms[1:] / norms[:-1]).sum(0).mean()
    return float(ratio + nn.functional.softplus(traces).sum(0).mean())


def assert_gradient_of_the_oracle(
    wiring: str, model: nn.Module, given: dict[str, Tensor], granularity: str, tolerance: float, **options: Any
) -> None:
    """J + H, and its derivative along one direction in all scales, equal the oracle's and its central differences."""
    h, generator, params = 1e-5, torch.Generator().manual_seed(1), ofa.tune_norms(model)
    with ofa.fused_regularizers(model, 1.0, 1.0, granularity=granularity, seed=5, **options) as reg:
        model(**given)
        penalty = reg.penalty()
        gradients = torch.autograd.grad(penalty, params, allow_unused=True)
    assert sum(gradient is None for gradient in gradients) <= 1  # the final norm comes after the last step
    assert float(penalty) == pytest.approx(penalty_of(oracle.steps(wiring, model, given, granularity)), rel=tolerance)
    moves = [torch.randn(param.shape, generator=generator).to(param) for param in params]
    slope = sum(float((g * move).sum()) for g, move in zip(gradients, moves, strict=True) if g is not None)
    ends = []
    for sign in (1, -1):
        for param, move in zip(params, moves, strict=True):
            param.data += sign * h * move
        ends.append(penalty_of(oracle.steps(wiring, model, given, granularity)))
        for param, move in zip(params, moves, strict=True):
            param.data -= sign * h * move
    # The error is h² = 10⁻¹⁰ times a third derivative, and the rounding 10⁻¹³/h = 10⁻⁸ of a penalty of 10².
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=max(tolerance, 1e-5), abs=1e-4)
    assert abs(slope) > 1e-2


PROBES: dict[str, Any] = {"estimator": "hutchinson", "gradient": "full", "epsilon": 1e-8, "tokens": "all"}
PROBED = 1e-3
"""The error of νᵀJPν: F's curvature over ε, and rounding 10⁻¹⁶/ε of updates of length 10²."""

FALLBACK = [case for case in oracle.CASES if case[0] in (*POST_NORM, "gemma3", "olmo2", "falcon_alibi")]


@pytest.mark.parametrize(("name", "granularity"), FALLBACK)
def test_probes_have_the_full_gradient_of_the_oracle(name: str, granularity: str) -> None:
    """Also with norms after branches or sums, sandwiches, OPT-350m's norm of the sum, and ALiBi."""
    with oracle.Float64():
        model, given = copy.deepcopy(oracle.model(name)), oracle.batch(name, sequences=1)
        assert_gradient_of_the_oracle(name, model, given, granularity, PROBED, **PROBES)


def in_float64(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A vision-language model and images in float64."""
    given = families.images_and_text(name)
    doubled = {key: value.double() if value.is_floating_point() else value for key, value in given.items()}
    return families.vision_language(name).double(), doubled


@pytest.mark.parametrize("name", [name for name in BEHAVES_AS if BEHAVES_AS[name] not in POST_NORM])
def test_the_language_part_has_the_trace_of_dense_jacobians_with_images(name: str) -> None:
    """Positions with three axes (Qwen2-VL) and bidirectional attention to images (PaliGemma) are in the closed form."""
    with oracle.Float64():
        model, given = in_float64(name)
        steps = oracle.steps(BEHAVES_AS[name], model, given, "sublayer")
        assert_dense(model, given, solve(BEHAVES_AS[name], model, given))
        other = oracle.steps(BEHAVES_AS[name], model, {**given, "pixel_values": -given["pixel_values"]}, "sublayer")
    # The stream depends on the images.
    assert float((other[0].stream - steps[0].stream).abs().max()) > 1e-2


@pytest.mark.parametrize("name", BEHAVES_AS)
def test_the_language_part_has_the_gradient_of_the_oracle_with_images(name: str) -> None:
    with oracle.Float64():
        model, given = in_float64(name)
        assert_gradient_of_the_oracle(BEHAVES_AS[name], model, given, "sublayer", PROBED, **PROBES)


def test_copies_enter_no_cache_of_keys_and_values() -> None:
    """LLaVA takes `use_cache` in **kwargs and makes a cache in training; a branch run again must not use it."""
    found = []
    for asked in ({}, {"use_cache": False}):
        model, given = families.vision_language("llava"), families.images_and_text("llava")
        ofa.tune_norms(model)
        with ofa.fused_regularizers(model, 0.0, 1.0, estimator="hutchinson", epsilon=1e-3) as reg:
            model(**given, **asked)
            found.append(reg.measurements.traces)
    # Masks may differ with a cache: some roundings of 2⁻²⁴, divided by ε = 10⁻³.
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


def test_a_batch_of_three_is_not_taken_for_the_axes_of_positions() -> None:
    """Qwen2-VL's positions have three axes, which must not be repeated like three sequences."""
    model = families.vision_language("qwen2_vl")
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    freeze(model)
    traces = [traces_of(model, {"input_ids": batch}) for batch in (ids, *ids.split(1))]
    # The same sequences alone: sums of float32 in another order.
    torch.testing.assert_close(traces[0], torch.cat(traces[1:], 1), rtol=1e-4, atol=1e-4)
    for gradient in ("preconditioner", "full"):
        options = {"estimator": "hutchinson", "gradient": gradient, "samples": 2}
        assert torch.isfinite(traces_of(model, {"input_ids": ids}, **options)).all()
