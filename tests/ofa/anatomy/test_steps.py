"""The steps of every family are found, and models that do not fit are refused in one sentence."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from torch import nn

from ofa import InputError
from ofa.anatomy import steps as anatomy
from tests import families

EXPECTED = {
    # name: (wiring, steps at the sublayer granularity, norms, kind, offset)
    "llama": ("sequential", 6, 7, "rms", 0),
    "mistral": ("sequential", 6, 7, "rms", 0),
    "qwen2": ("sequential", 6, 7, "rms", 0),
    "qwen3": ("sequential", 6, 13, "rms", 0),
    "smollm3": ("sequential", 6, 7, "rms", 0),
    "granite": ("sequential", 6, 7, "rms", 0),
    "gemma": ("sequential", 6, 7, "rms", 1),
    "gemma2": ("sandwich", 6, 13, "rms", 1),
    "gemma3": ("sandwich", 6, 19, "rms", 1),
    "phi3": ("sequential", 6, 7, "rms", 0),
    "olmo2": ("branch norm", 6, 13, "rms", 0),
    "cohere": ("parallel", 3, 4, "layer", 0),
    "phi": ("parallel", 3, 4, "layer", 0),
    "gpt2": ("sequential", 6, 7, "layer", 0),
    "gptj": ("parallel", 3, 4, "layer", 0),
    "gpt_neox": ("parallel", 3, 7, "layer", 0),
    "gpt_neox_sequential": ("sequential", 6, 7, "layer", 0),
    "opt": ("sequential", 6, 7, "layer", 0),
    "opt_post_norm": ("post norm", 0, 6, "layer", 0),
    "mixtral": ("sequential", 6, 7, "rms", 0),
    "qwen3_moe": ("sequential", 6, 13, "rms", 0),
    "gpt_oss": ("sequential", 6, 7, "rms", 0),
    "falcon": ("parallel", 3, 4, "layer", 0),
    "falcon_alibi": ("parallel", 3, 4, "layer", 0),
    "falcon_two_norms": ("parallel", 3, 7, "layer", 0),
    "falcon_sequential": ("sequential", 6, 7, "layer", 0),
    "bert": ("post norm", 6, 7, "layer", 0),
    "vit": ("sequential", 6, 7, "layer", 0),
}


def test_the_table_covers_every_family() -> None:
    """A family added to `tests.families` must get a row here."""
    assert EXPECTED.keys() == families.BUILDERS.keys()


@pytest.mark.parametrize("name", families.BUILDERS)
def test_every_family_is_found(name: str) -> None:
    """Wiring, steps, norms and their formula, also with the rounding of bfloat16."""
    wiring, steps, norms, kind, offset = EXPECTED[name]
    model = families.build(name)
    wide = anatomy.find(model)
    found = anatomy.find(model.bfloat16())
    assert found == wide
    assert found.wiring == wiring
    assert (len(found.sublayer_steps), len(found.layer_steps), len(found.layers)) == (steps, 3, 3)
    assert (len(found.norms), {(norm.kind, norm.offset) for norm in found.norms}) == (norms, {(kind, offset)})
    assert found.tuned_parameters == sum(model.get_parameter(f"{norm.path}.weight").numel() for norm in found.norms)
    assert [step.layer for step in found.layer_steps] == [0, 1, 2]
    for step in (*found.sublayer_steps, *found.layer_steps):
        for branch in step.branches:
            assert branch.norm in found.norms
            assert branch.entry.startswith(found.layers[step.layer])
    assert {step.scale for step in found.sublayer_steps} <= {0.5 if name == "granite" else 1.0}


@pytest.mark.parametrize("name", ["phi", "falcon_two_norms", "gpt_neox"])
def test_parallel_branches_share_a_step(name: str) -> None:
    """A parallel layer is one step of two branches, each with its norm."""
    for step in anatomy.find(families.build(name)).sublayer_steps:
        assert [branch.role for branch in step.branches] == ["attention", "mlp"]
        assert len({branch.norm for branch in step.branches}) == (1 if name == "phi" else 2)


def test_a_post_norm_opt_has_no_sublayer_steps_and_says_so() -> None:
    """OPT-350m has no module between its sublayers: "layer" works, and the error for "sublayer" names it."""
    found = anatomy.find(families.build("opt_post_norm"))
    assert len(found.steps("layer")) == 3
    with pytest.raises(InputError, match="granularity='layer'"):
        found.steps("sublayer")


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(InputError, match="granularity must be one of sublayer, layer, not 'token'"):
        anatomy.find(families.build("llama")).steps("token")


def _sum_without_attention(layer: Any) -> None:
    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    layer.forward = types.MethodType(forward, layer)


def _scaled_branch(layer: Any) -> None:
    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        hidden_states = hidden_states + 0.9 * attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    layer.forward = types.MethodType(forward, layer)


def _parallel_mlp(layer: Any) -> None:
    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + attended + self.mlp(self.post_attention_layernorm(hidden_states))

    layer.forward = types.MethodType(forward, layer)


def _norm_of_something_else(layer: Any) -> None:
    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(hidden_states=self.input_layernorm(-hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    layer.forward = types.MethodType(forward, layer)


def _renamed_attention(layer: Any) -> None:
    layer.attend = layer.self_attn
    del layer.self_attn


@pytest.mark.parametrize(
    ("rewire", "reason"),
    [
        (_sum_without_attention, "does not read the residual stream"),
        (_scaled_branch, "does not read the residual stream"),
        (_parallel_mlp, "does not read the residual stream"),
        (_norm_of_something_else, "does not read the residual stream"),
        (_renamed_attention, "no module self_attn"),
    ],
)
def test_a_rewired_family_is_refused(rewire: Any, reason: str) -> None:
    """A release with other sums, order or names is refused instead of silently mismeasured."""
    model = families.build("llama")
    for layer in model.model.layers:
        rewire(layer)
    with pytest.raises(InputError, match=f"not recognized.*{reason}"):
        anatomy.find(model)


@pytest.mark.parametrize("name", ["gpt2", "opt", "opt_post_norm"])
def test_a_changed_residual_sum_is_refused(name: str) -> None:
    """The last sum of a layer is checked too; OPT's other wiring does not match it either."""
    model = families.build(name)
    layer = model.get_submodule(anatomy._layer_paths(model, "")[0])
    layer.register_forward_hook(lambda module, args, output: 1.01 * output, prepend=True)
    with pytest.raises(InputError, match="not recognized"):
        anatomy.find(model)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi", "olmo2", "gpt2", "bert", "opt_post_norm"])
def test_an_unknown_model_type_is_recognized_by_its_structure(name: str) -> None:
    """A type without a row is tried against every wiring, and the trial run decides."""
    model = families.build(name)
    model.config.model_type = "brand-new"
    model.base_model.config.model_type = "brand-new"
    found = anatomy.find(model)
    assert (found.model_type, found.wiring) == ("brand-new", EXPECTED[name][0])


@pytest.mark.parametrize("name", ["gpt2", "phi"])
def test_a_step_whose_norm_has_no_weight_is_refused(name: str) -> None:
    """OLMo-1's norms have nothing to tune; the message names the norm."""
    model = families.build(name)
    layer = anatomy._layer_paths(model, "")[1]
    norm = "ln_2" if name == "gpt2" else "input_layernorm"
    model.get_submodule(layer).register_module(norm, nn.LayerNorm(32, elementwise_affine=False))
    with pytest.raises(InputError, match=f"{layer}.{norm}.*no one-dimensional weight"):
        anatomy.find(model)


def test_a_model_without_norms_is_refused() -> None:
    model = families.build("gpt2")
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent).register_module(name, nn.Identity())
    for function in (anatomy.find, anatomy.tuned_norms):
        with pytest.raises(InputError, match="no norm with a one-dimensional weight"):
            function(model)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(InputError, match="no stack of decoder layers"):
        anatomy.find(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))


def test_a_norm_that_computes_something_else_is_refused() -> None:
    """A class named RMSNorm that computes another function would give wrong displacements."""
    model = families.build("llama")
    model.model.layers[0].input_layernorm.forward = torch.tanh
    with pytest.raises(InputError, match="neither RMSNorm nor LayerNorm"):
        anatomy.find(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "vit"])
@pytest.mark.parametrize("fails", [False, True], ids=["found", "refused"])
def test_finding_steps_changes_nothing(name: str, fails: bool) -> None:
    """Training flags, hooks, parameters, gradients and the random state are unchanged, also after a refusal."""
    model = families.build(name).train()
    layer = model.get_submodule(anatomy._layer_paths(model, "")[0])
    frozen = next(
        module for module in layer.modules() if isinstance(module, nn.Linear) or "Conv1D" in str(type(module))
    )
    frozen.eval()
    if fails:
        layer.register_forward_hook(lambda module, args, output: 2 * output, prepend=True)
    modes = {path: module.training for path, module in model.named_modules()}
    hooks = _count_hooks(model)
    state = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    if fails:
        with pytest.raises(InputError):
            anatomy.find(model)
    else:
        anatomy.find(model)
    assert {path: module.training for path, module in model.named_modules()} == modes
    assert _count_hooks(model) == hooks
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def _count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
