"""Exactly the norm scales train, in float32; afterwards the model is unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ofa
from ofa import anatomy
from ofa.errors import InputError
from tests.families import BUILDERS, build, inputs

# Every family: a class of norms is tuned by its own parameters, dtypes and forward.
over_families = pytest.mark.parametrize("name", BUILDERS)


@pytest.fixture(autouse=True, scope="module")
def _no_gradients_by_default():
    with torch.no_grad():
        yield


def logits(model, name):
    batch = inputs(name)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    return model(**batch).logits


def norm_modules(model):
    """Every norm by the name of its class, found without the code under test."""
    return {
        path: module
        for path, module in model.named_modules()
        if ("RMSNorm" in type(module).__name__ or "LayerNorm" in type(module).__name__)
    }


def state_of(model):
    """Objects that must be restored: parameters, flags and hooks of every module."""
    return (
        [(path, id(p), p.requires_grad, p.dtype) for path, p in model.named_parameters(remove_duplicate=False)],
        [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()],
    )


@over_families
def test_exactly_the_norm_scales_train_and_are_float32(name):
    model = build(name).to(torch.bfloat16)
    tuned = ofa.tune_norms(model)
    expected = [f"{path}.weight" for path in norm_modules(model)]
    trainable = {path: p for path, p in model.named_parameters() if p.requires_grad}
    assert list(trainable) == expected
    assert [id(p) for p in tuned] == [id(p) for p in trainable.values()]
    assert {p.dtype for p in tuned} == {torch.float32}
    assert all(p.dim() == 1 and p.is_leaf for p in tuned)


@over_families
def test_a_float32_forward_does_not_change_by_a_bit(name):
    model = build(name)
    before = logits(model, name)
    ofa.tune_norms(model)
    assert torch.equal(logits(model, name), before)


@over_families
def test_a_bfloat16_forward_keeps_its_dtype_and_stays_within_rounding(name):
    """A tuned norm rounds once, the model's own may round twice; the difference is one unit of bfloat16."""
    model = build(name).to(torch.bfloat16)
    outputs = {}

    def record(path):
        def hook(module, args, output):
            outputs.setdefault(path, []).append(output)

        return hook

    before = logits(model, name)
    ofa.tune_norms(model)
    handles = [module.register_forward_hook(record(path)) for path, module in norm_modules(model).items()]
    after = logits(model, name)
    for handle in handles:
        handle.remove()
    assert {output.dtype for seen in outputs.values() for output in seen} == {torch.bfloat16}
    assert after.dtype == before.dtype == torch.bfloat16
    exact = logits(build(name), name)
    # The base's own distance from float32 measures how its depth amplifies single roundings; the tuned model runs
    # the same operations with no more roundings, so the two differ by at most that distance each, twice in all.
    rounding = (before.float() - exact).abs().max()
    assert (after.float() - before.float()).abs().max() <= 2 * rounding


# In bfloat16, where a tuned norm has a forward pass of its own; test_families_dropin.py has float32.
@over_families
def test_one_step_moves_every_scale(name):
    """A norm that silently does not train has been a bug of such libraries."""
    model = build(name).bfloat16()
    tuned = ofa.tune_norms(model)
    before = [p.clone() for p in tuned]
    with torch.enable_grad():
        batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs(name).items()}
        model(**batch).loss.float().backward()
    # Relative to the gradient's size, which varies widely in these random models.
    torch.optim.SGD(tuned, lr=1e-3 / max(float(p.grad.abs().max()) for p in tuned)).step()
    still = [path for path, p, old in zip(norm_modules(model), tuned, before, strict=True) if torch.equal(p, old)]
    assert not still
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@over_families
def test_restoring_undoes_tuning(name):
    model = build(name).bfloat16()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
    before, answer = state_of(model), logits(model, name)
    values = {path: value.clone() for path, value in model.state_dict().items()}
    for parameter in ofa.tune_norms(model):
        parameter.add_(1.0)
    assert not torch.equal(logits(model, name), answer)
    ofa.restore_norms(model)
    assert state_of(model) == before
    assert all(torch.equal(value, values[path]) for path, value in model.state_dict().items())
    assert torch.equal(logits(model, name), answer)


def test_tuning_again_keeps_values_parameters_and_hooks():
    model = build("llama").to(torch.bfloat16)
    first = ofa.tune_norms(model)
    first[0].add_(1.0)
    state = state_of(model)
    second = ofa.tune_norms(model)
    assert [id(p) for p in first] == [id(p) for p in second]
    assert state_of(model) == state


def test_tuning_after_restoring_starts_from_the_base():
    model = build("llama")
    for parameter in ofa.tune_norms(model):
        parameter.zero_()
    ofa.restore_norms(model)
    base = [norm.weight.clone() for norm in norm_modules(model).values()]
    assert all(torch.equal(p, own) for p, own in zip(ofa.tune_norms(model), base, strict=True))


def test_restoring_an_untouched_model_does_nothing():
    model = build("llama")
    before = state_of(model)
    ofa.restore_norms(model)
    assert state_of(model) == before


def test_models_do_not_share_their_tuning():
    model, other = build("llama"), build("llama")
    before = state_of(other)
    for parameter in ofa.tune_norms(model):
        parameter.zero_()
    ofa.restore_norms(other)
    assert state_of(other) == before
    assert not any(norm.weight.any() for norm in norm_modules(model).values())


def test_a_float64_model_is_tuned_in_float64():
    tuned = ofa.tune_norms(build("llama").double())
    assert {p.dtype for p in tuned} == {torch.float64}


def test_a_model_without_norm_scales_is_refused():
    with pytest.raises(InputError, match="no scale to tune; choose a model whose norms have weights"):
        ofa.tune_norms(nn.Sequential(nn.Linear(2, 2)))


SHAPES = {
    "SmolLM2-135M": (
        35_136,
        {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
        | {"intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True},
    ),
    "Llama-2-7B": (
        266_240,
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    ),
}


@pytest.mark.parametrize(("count", "fields"), SHAPES.values(), ids=SHAPES)
def test_published_models_have_the_published_number_of_scales(count, fields):
    """Weights are on the meta device except the norms, whose formula is found by calling them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**fields))
    for norm in norm_modules(model).values():
        norm.to_empty(device="cpu").weight.fill_(1.0)
    assert sum(p.numel() for p in ofa.tune_norms(model)) == count
    assert sum(norm.width for norm in anatomy.tuned_norms(model)) == count
