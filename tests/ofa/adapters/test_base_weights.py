"""Digests detect a base with the right norms but other weights, and name the layer."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

import ofa
from ofa.adapters.base_weights import difference, weight_digests


@pytest.fixture
def model(tiny_model):
    return tiny_model[0].cpu()


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float16])
def test_one_base_in_two_dtypes_is_the_same(model, narrow):
    """Saved in float32 and loaded in half precision, or the reverse."""
    other = copy.deepcopy(model).to(narrow)
    assert difference(weight_digests(model), weight_digests(other)) is None
    assert difference(weight_digests(other), weight_digests(model)) is None


def test_differing_layers_are_named(model):
    """A change visible in bfloat16 in a single layer; a tuned norm is no difference."""
    saved = weight_digests(model)
    assert list(saved) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "lm_head"]
    ofa.tune_norms(model)
    with torch.no_grad():
        model.get_parameter("model.layers.1.input_layernorm.weight").mul_(2)
        assert difference(saved, weight_digests(model)) is None
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.01)
        assert difference(saved, weight_digests(model)) == "model.layers.1"
        model.get_parameter("lm_head.weight").mul_(1.01)
    assert difference(saved, weight_digests(model)) == "model.layers.1 and 1 more of 5 modules"


def test_packed_weights_are_not_compared(model):
    """A quantized base has the same norms, but its layers hold packed tensors."""
    saved = weight_digests(model)
    packed = torch.zeros(8, dtype=torch.uint8)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    assert difference(saved, weight_digests(model)) is None


def test_an_adapter_in_another_fine_tune_of_its_base_warns_once(model, tmp_path, caplog):
    """It loads, because the user may want that, with a warning that predictions may differ."""
    ofa.tune_norms(model)
    ofa.save_adapter(model, tmp_path)
    ofa.restore_norms(model)
    with caplog.at_level(logging.WARNING, logger="ofa"):
        ofa.load_adapter(model, tmp_path)
        ofa.restore_norms(model)
        assert told(caplog) == []
        with torch.no_grad():
            model.model.layers[2].self_attn.q_proj.weight.add_(0.1)
        for _ in range(2):
            ofa.load_adapter(model, tmp_path)
            ofa.restore_norms(model)
    (message,) = told(caplog)
    assert "has the same norms but other weights (model.layers.2)" in message


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("ofa")]
