"""Recognizing a branch by a trial run (projections, layout, rotary embedding, activation), and its hooks."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.activations import ACT2FN
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_overlay,
)

import ofa
from ofa import anatomy
from ofa.anatomy import trial_run as trial
from ofa.regularizers.closed_form import attention_interface
from ofa.regularizers.closed_form.attention_interface import AttentionCapture
from ofa.regularizers.closed_form.modules import AttentionModules, ExpertsModules, HeadShape, MlpModules, NoClosedForm
from ofa.regularizers.closed_form.recognize import AttentionSpec, ExpertsSpec, MlpSpec, Recognized, recognize
from tests import families, oracle
from tests.cases import CLOSED
from tests.device import DEVICE
from tests.ofa.traces import built, frozen, hooks_of, measuring

SEPARATE = ("q_proj", "k_proj", "v_proj")
LLAMA = (SEPARATE, "o_proj", "separate", "half", (4, 2))
GATED = ("gate_proj", "up_proj", "down_proj")
NEOX_MLP = ("dense_h_to_4h", None, "dense_4h_to_h", "gelu")
ATTENTIONS: dict[str, tuple[tuple[str, ...], str, str, str, tuple[int, int]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"), LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "olmo2", "mixtral", "qwen3_moe"), LLAMA),
    "gpt_oss": (SEPARATE, "o_proj", "separate", "single", (4, 2)),
    "cohere": (SEPARATE, "o_proj", "separate", "interleaved", (4, 2)),
    "phi3": (("qkv_proj",) * 3, "o_proj", "stacked", "half", (4, 2)),
    "phi": (SEPARATE, "dense", "separate", "half", (4, 2)),
    "gpt2": (("c_attn",) * 3, "c_proj", "stacked", "none", (4, 4)),
    "gptj": (SEPARATE, "out_proj", "separate", "interleaved", (4, 4)),
    **dict.fromkeys(
        ("gpt_neox", "gpt_neox_sequential"), (("query_key_value",) * 3, "dense", "per head", "half", (4, 4))
    ),
    "opt": (SEPARATE, "out_proj", "separate", "none", (4, 4)),
    **dict.fromkeys(("falcon", "falcon_sequential"), (("query_key_value",) * 3, "dense", "stacked", "half", (4, 1))),
    "falcon_alibi": (("query_key_value",) * 3, "dense", "stacked", "none", (4, 1)),
    "falcon_two_norms": (("query_key_value",) * 3, "dense", "grouped", "half", (4, 2)),
    "vit": (SEPARATE, "o_proj", "separate", "none", (4, 4)),
}
"""Projections of queries, keys and values, output projection, layout, rotary embedding, query heads and key heads."""

MLPS: dict[str, tuple[str, str | None, str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "cohere", "olmo2"), (*GATED, "silu")),
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), (*GATED, "gelu_tanh")),
    "phi3": ("gate_up_proj", "gate_up_proj", "down_proj", "silu"),
    "phi": ("fc1", None, "fc2", "gelu_tanh"),
    "gpt2": ("c_fc", None, "c_proj", "gelu_tanh"),
    "gptj": ("fc_in", None, "fc_out", "gelu_tanh"),
    **dict.fromkeys(("gpt_neox", "gpt_neox_sequential"), NEOX_MLP),
    **dict.fromkeys(("falcon", "falcon_alibi", "falcon_sequential", "falcon_two_norms"), NEOX_MLP),
    "opt": ("fc1", None, "fc2", "relu"),
    "vit": ("fc1", None, "fc2", "gelu"),
}
"""Gate, up and down projection, and the activation."""

MIXTURES = {
    "mixtral": ExpertsSpec("silu", None, renormalized=True),
    "qwen3_moe": ExpertsSpec("silu", None, renormalized=False),
    "gpt_oss": ExpertsSpec("quick_gelu", 0.5, renormalized=True),
}

HEAD_NORMS = {"qwen3": (True, 0.0), "qwen3_moe": (True, 0.0), "gemma3": (False, 1.0), "olmo2": (False, 0.0)}
"""Whether norms on heads read (tokens, heads) instead of (heads, tokens), and their offset."""


def recognized(model: nn.Module) -> tuple[Recognized, ...]:
    """Every branch of a model's sublayer steps, recognized."""
    found = anatomy.find(model)
    return recognize(model, found, found.steps("sublayer"))


def last(linear: Any) -> str | None:
    """The name of a projection in its module."""
    return None if linear is None else linear.path.rpartition(".")[2]


@pytest.mark.parametrize("name", CLOSED)
def test_families_are_recognized(name: str) -> None:
    """Each family: its projections, their layout, rotary embedding and activation."""
    projections, output, layout, rotary, heads = ATTENTIONS[name]
    found = recognized(frozen(name))
    assert len(found) == 6
    for one in found:
        modules, spec = one.modules, one.spec
        assert (one.before is None) == (name == "olmo2")
        assert (one.after is not None) == (name in ("gemma2", "gemma3", "olmo2"))
        if isinstance(modules, ExpertsModules):
            assert spec == MIXTURES[name]
            continue
        if isinstance(modules, MlpModules):
            gate, up, down, activation = MLPS[name]
            assert (last(modules.gate), last(modules.up), last(modules.down)) == (gate, up, down)
            assert modules.fused == (name == "phi3")
            assert spec == MlpSpec(activation)
            continue
        assert isinstance(spec, AttentionSpec)
        assert tuple(map(last, (modules.query, modules.key, modules.value))) == projections
        assert last(modules.output) == output
        # SmolLM3 rotates all but every fourth layer, and these models have three.
        assert (spec.layout, spec.rotary, spec.shape) == (layout, rotary, HeadShape(*heads, 8))
        # OPT scales the projected queries, and its attention has no scale.
        assert spec.query_factor == (pytest.approx(8**-0.5) if name == "opt" else 1.0)
        assert (modules.query_norm is not None) == (modules.key_norm is not None) == (name in HEAD_NORMS)
        # Four tokens and four heads: the shape does not tell which come first.
        assert (spec.norm_tokens_first, spec.norm_offset) == HEAD_NORMS.get(name, (False, 0.0))
        assert (spec.norm_eps > 0) == (name in HEAD_NORMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tuned_norms_of_heads_are_recognized(dtype: torch.dtype) -> None:
    """Tuned norms upcast their input; the orientation is still found."""
    model = families.build("qwen3").to(dtype)
    ofa.tune_norms(model)
    attentions = [one.spec for one in recognized(model) if isinstance(one.spec, AttentionSpec)]
    assert [one.norm_tokens_first for one in attentions] == [True] * 3


def test_layers_without_rotary_are_told_apart() -> None:
    """SmolLM3's layers without positions are recognized separately, though shapes are equal."""
    model = built("smollm3")
    model.model.layers[1].self_attn.use_rope = 0
    kinds = [one.spec.rotary for one in recognized(model) if isinstance(one.spec, AttentionSpec)]
    assert kinds == ["half", "none", "half"]


def test_both_ways_of_storing_a_matrix() -> None:
    """GPT-2's Conv1D stores the transpose of a Linear's weight: `Linear` has (outputs, inputs) and the same image."""
    (conv,) = {one.modules.gate for one in recognized(frozen("gpt2")) if "h.1.mlp" in one.branch.entry}
    (linear,) = {one.modules.gate for one in recognized(frozen("gpt_neox")) if "layers.1.mlp" in one.branch.entry}
    for one, shape in ((conv, (128, 32)), (linear, (48, 32))):
        rows = torch.randn(3, 32, dtype=torch.float64).to(DEVICE)
        assert one.shape == tuple(one.weight().shape) == shape
        torch.testing.assert_close(one.image(rows), one.module(rows).detach())


@pytest.mark.parametrize("layout", ["separate", "stacked", "per head", "grouped"])
def test_layouts_split_rows_into_heads(layout: str) -> None:
    """Numbered rows of a projection go to the right heads in every layout; impossible shapes are refused."""
    heads, shared, width = (4, 4, 2) if layout == "per head" else (4, 2, 2)
    shape, total = HeadShape(heads, shared, width), (heads + 2 * shared) * width
    fused = torch.arange(total)
    apart = fused.split([heads * width, shared * width, shared * width])
    q, k, v = shape.split(layout, tuple(apart) if layout == "separate" else (fused,) * 3)
    assert (q.shape, k.shape, v.shape) == ((heads, width), (shared, width), (shared, width))
    together = torch.cat([q.flatten(), k.flatten(), v.flatten()])
    assert torch.equal(together.sort().values, fused)
    firsts = {"separate": (2, 8, 12), "stacked": (2, 8, 12), "per head": (6, 2, 4), "grouped": (2, 4, 6)}[layout]
    assert (int(q[1, 0]), int(k[0, 0]), int(v[0, 0])) == firsts
    with pytest.raises((ValueError, RuntimeError)):
        HeadShape(3, 2, 2).split(layout, tuple(apart) if layout == "separate" else (fused,) * 3)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("relu", "relu"),
        ("quick_gelu", "quick_gelu"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_activations_are_found_by_what_they_compute(name: str, activation: str, expected: str) -> None:
    """Under any name in transformers, gated or plain."""
    found = recognized(_with(name, activation))
    assert {one.spec.activation for one in found if isinstance(one.spec, MlpSpec)} == {expected}


@pytest.mark.parametrize("activation", ["mish", "relu2", "tanh", "sigmoid", "leaky_relu", "linear"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_other_activations_have_no_closed_form(name: str, activation: str) -> None:
    """Similar ones are refused too; the reason lists the known ones."""
    with pytest.raises(NoClosedForm, match=r"the activation before .* is none of silu, .*, relu, quick_gelu$"):
        recognized(_with(name, activation))


def _with(name: str, activation: str) -> nn.Module:
    model = built(name)
    for module in list(model.modules()):
        for attribute in ("act_fn", "act"):
            if hasattr(module, attribute):
                setattr(module, attribute, ACT2FN[activation])
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("q_norm", r"model\.layers\.0\.self_attn does more than project, rotate and attend"),
        ("scale", r"model\.layers\.0\.self_attn does more than project, rotate and attend"),
        ("gate", r"model\.layers\.0\.mlp\.gate_proj does not read the branch's input"),
        ("names", r"model\.layers\.0\.mlp \(LlamaMLP\) has no projections that are known by name"),
    ],
)
def test_a_branch_that_does_something_else_has_no_closed_form(change: str, reason: str) -> None:
    """Any other operation inside the branch changes its tensors and is found."""
    model = built("llama")
    layer = model.model.layers[0]
    if change == "q_norm":
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, output: output.tanh())
    elif change == "scale":
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    elif change == "gate":
        layer.mlp.gate_proj.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    else:
        layer.mlp.gate_projection, layer.mlp.forward = layer.mlp.gate_proj, lambda hidden: hidden.sin()
        del layer.mlp.gate_proj
    with pytest.raises(NoClosedForm, match=reason):
        recognized(model)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "vit"])
def test_the_model_s_own_attention_function_is_called(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once per layer, with the same arguments and masks as without capture."""
    model, given, calls = frozen(name), oracle.batch(name), []
    if name != "vit":
        given |= {"attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], device=DEVICE), "use_cache": False}
    own = AttentionInterface()["sdpa"]

    def recording(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append((module, args, kwargs))
        return own(module, *args, **kwargs)

    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    if implementation == "eager":
        source = sys.modules[type(next(m for m in model.modules() if attention_interface.supports(m))).__module__]
        monkeypatch.setattr(source, "eager_attention_forward", recording)
    else:
        monkeypatch.setitem(attention_functions(), "sdpa", recording)
    try:
        with torch.no_grad():
            model(**given)
            plain, calls[:] = list(calls), []
            with measuring(model) as reg, reg.measuring():
                calls.clear()  # the trial runs
                model(**given)
    finally:
        model.set_attn_implementation(before)
    assert len(calls) == len(plain) == 3
    for (module, args, kwargs), (same, expected, named) in zip(calls, plain, strict=True):
        assert module is same
        assert kwargs.keys() == named.keys()
        for one, other in zip((*args, *kwargs.values()), (*expected, *named.values()), strict=True):
            if isinstance(one, Tensor):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # after norms in float32
            elif not isinstance(one, tuple):
                assert one == other


def attention_functions() -> dict[str, Any]:
    """The registry of attention functions of transformers."""
    mapping: dict[str, Any] = AttentionInterface._global_mapping
    return mapping


@pytest.mark.parametrize(
    ("described", "forbids"),
    [
        (causal_mask_function, True),
        (and_masks(causal_mask_function, packed_sequence_mask_function(torch.zeros(1, 4))), True),
        (and_masks(sliding_window_overlay(2), and_masks(causal_mask_function)), True),
        (and_masks(sliding_window_overlay(2)), False),
        (or_masks(causal_mask_function, sliding_window_overlay(2)), False),
        (bidirectional_mask_function, False),
    ],
)
def test_masks_that_transformers_makes_causal_are_known_without_reading_them(described: Any, forbids: bool) -> None:
    """A mask cannot be read during CUDA-graph capture, and transformers then makes one for every batch."""
    assert attention_interface._forbids_later(described) is forbids


@pytest.mark.parametrize(
    ("mask", "causal"),
    [
        (None, True),
        (torch.ones(1, 1, 4, 4).tril().bool(), True),
        (torch.zeros(1, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), torch.finfo(torch.float32).min), True),
        (torch.ones(1, 1, 4, 4).bool(), False),
        (torch.zeros(1, 1, 4, 4), False),
    ],
    ids=["none", "boolean", "bias", "whole", "no bias"],
)
def test_causal_masks_are_recognized(mask: Tensor | None, causal: bool) -> None:
    """Only if no query of any sequence sees a later key, and never for a module that is not causal."""
    module = built("llama").model.layers[0].self_attn
    heads = [torch.randn(1, count, 4, 8).to(DEVICE) for count in (4, 2, 2)]
    mask = None if mask is None else mask.to(DEVICE)
    seen = attention_interface._call("sdpa", module, *heads, mask, {"scaling": 0.25})
    attends = seen.attends
    assert (attends.causal, attends.scale, seen.unusual) == (causal, 0.25, None)
    assert attends.mask is None if mask is None else torch.equal(attends.mask, mask)
    module.is_causal = False
    assert not attention_interface._call("sdpa", module, *heads, mask, {}).attends.causal


def test_arguments_of_the_attention_function_are_captured() -> None:
    """Soft-caps and sinks are in the closed form; a position bias is not, and is named."""
    module = built("llama").model.layers[0].self_attn
    heads = [torch.randn(1, count, 4, 8).to(DEVICE) for count in (4, 2, 2)]
    sinks = torch.ones(4, device=DEVICE, requires_grad=True)
    seen = attention_interface._call("eager", module, *heads, None, {"softcap": 20.0, "s_aux": sinks})
    assert (seen.attends.softcap, seen.unusual) == (20.0, None)
    assert torch.equal(seen.attends.sinks, sinks.detach())
    given = {"position_bias": torch.ones(1, device=DEVICE)}
    assert attention_interface._call("eager", module, *heads, None, given).unusual == "position_bias"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_names_are_restored_by_the_last_capture(implementation: str) -> None:
    """Two captures share a configuration: the name returns when both are removed, in any order, also twice."""
    model = built("llama")
    model.set_attn_implementation(implementation)
    attentions = [layer.self_attn for layer in model.model.layers]
    first, second = AttentionCapture(attentions), AttentionCapture(attentions)
    assert model.config._attn_implementation == f"ofa_{implementation}"
    first.remove()
    first.remove()
    assert model.config._attn_implementation == f"ofa_{implementation}"
    second.remove()
    assert model.config._attn_implementation == implementation
    assert id(model.config) not in attention_interface._uses


def test_falcon_and_gptj_cannot_be_captured() -> None:
    """They do not use the registry: their configurations keep their names, and projections are tapped instead."""
    for name, watched in (("falcon", False), ("gptj", False), ("llama", True)):
        model = built(name)
        modules = [one.modules for one in recognized(model) if isinstance(one.modules, AttentionModules)]
        assert {attention_interface.supports(one.module) for one in modules} == {watched}
        with measuring(model):
            assert model.config._attn_implementation.startswith("ofa_") == watched


@pytest.mark.parametrize("case", ["found", "refused"])
def test_recognizing_leaves_the_model_as_it_was(case: str) -> None:
    """Hooks, names, modules' modes, gradients and random numbers are unchanged, with or without a closed form."""
    model = built("llama") if case == "found" else _with("llama", "mish")
    model.train()
    model.model.layers[1].eval()
    modes, hooks = [module.training for module in model.modules()], hooks_of(model)
    name, state = model.config._attn_implementation, torch.get_rng_state()
    try:
        recognized(model)
    except NoClosedForm:
        assert case == "refused"
    assert [module.training for module in model.modules()] == modes
    assert hooks_of(model) == hooks
    assert model.config._attn_implementation == name
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_trial_run_ends_where_it_is_told_to() -> None:
    """Later layers are not run; the modules' modes are restored, also after an exception."""
    model, seen = built("llama").train(), []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda module, args, output, index=index: seen.append((index, module.training)))
    trial.run(model, until="model.layers.1.mlp")
    assert seen == [(0, False)]
    assert all(module.training for module in model.modules())

    def fail(module: nn.Module, args: Any) -> None:
        raise OSError("device lost")

    handle = model.model.layers[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(OSError, match="device lost"):
        trial.run(model, until="model.layers.1.mlp")
    handle.remove()
    assert all(module.training for module in model.modules())


# Full product: two activations are closest at one size and dtype each, gated and plain.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1, 4, 40])
@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("silu", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("relu", "relu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_large_or_rounded_hidden_units_do_not_hide_the_activation(name, activation, expected, factor, dtype) -> None:
    """With one large hidden unit, or bfloat16 roundings, silu is still not taken for gelu."""
    model = _with(name, activation)
    for path, parameter in model.named_parameters():
        if "gate_proj" in path or "h_to_4h" in path:
            parameter.data *= factor
    found = {one.spec.activation for one in recognized(model.to(dtype)) if isinstance(one.spec, MlpSpec)}
    if dtype == torch.bfloat16 and "gelu" in expected:
        # The two differ by at most 5·10⁻⁴, less than a rounding here.
        assert found <= {"gelu", "gelu_tanh"}
    else:
        assert found == {expected}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1, 4, 40])
@pytest.mark.parametrize("activation", ["mish", "gelu_10", "relu6"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_similar_ones_are_refused(name, activation, factor, dtype) -> None:
    """Also those that differ only outside the trial run's pre-activations: clipped at 6 or 10."""
    model = _with(name, activation)
    for path, parameter in model.named_parameters():
        if "gate_proj" in path or "h_to_4h" in path:
            parameter.data *= factor
    with pytest.raises(NoClosedForm):
        recognized(model.to(dtype))


def test_another_activation_in_a_later_layer_is_seen() -> None:
    """The trial run covers one layer of each kind, and the activation is part of the kind."""
    model = _with("llama", "silu")
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    found = [one.spec.activation for one in recognized(model) if isinstance(one.spec, MlpSpec)]
    assert found == ["silu", "relu", "silu"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_measuring_writes_to_no_weight(name) -> None:
    """Constants and traces use views of weights, and no in-place operation may change these."""
    model, given = families.build(name), families.inputs(name)
    ofa.tune_norms(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with ofa.fused_regularizers(model, estimator="exact") as regularizers:
        (model(**given).loss + regularizers.penalty()).backward()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_regularizers_that_are_never_closed_give_the_name_back_when_they_are_collected() -> None:
    model = _with("llama", "silu")
    ofa.tune_norms(model)
    config = model.config
    name = config._attn_implementation
    regularizers = ofa.fused_regularizers(model, estimator="exact")
    assert config._attn_implementation != name
    del model, regularizers
    gc.collect()
    assert config._attn_implementation == name
