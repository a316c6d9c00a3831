"""A classification head that trains beside the norm scales is saved, opened, merged and given back with them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import ofa
from ofa.adapters.read import read_adapter
from ofa.errors import InputError
from ofa.tuning.heads import ReplacedHead, tune_head
from tests.families import build, inputs

# PEFT warns about every norm, and tunes it anyway.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")


@torch.no_grad()
def logits(model: Any, name: str) -> Tensor:
    given = {key: value for key, value in inputs(name).items() if key != "labels"}
    return model(**given).logits


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_all_loaders_give_the_same_logits(name: str, tmp_path: Any) -> None:
    """In a user's own loop: a head that trains is part of the adapter."""
    model: Any = build(name)
    pristine, before = copy.deepcopy(model), logits(model, name)
    scales = ofa.tune_norms(model)
    head = model.classifier.requires_grad_(True)
    with torch.no_grad():
        for parameter in [*scales, *head.parameters()]:
            parameter += 0.1 * torch.randn_like(parameter)
    tuned = logits(model, name)
    ofa.save_adapter(model, tmp_path / "adapter", base_model="me/base")
    assert set(read_adapter(tmp_path / "adapter").head) == {"classifier.weight", "classifier.bias"}
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(copy.deepcopy(pristine), tmp_path / "adapter").eval(), name), tuned
    )
    merged = ofa.merge(pristine, tmp_path / "adapter", tmp_path / "merged")
    assert torch.equal(logits(type(pristine).from_pretrained(merged).eval().to(pristine.device), name), tuned)
    modules = dict(pristine.named_modules())
    ofa.load_adapter(pristine, tmp_path / "adapter")
    assert torch.equal(logits(pristine, name), tuned)
    ofa.restore_norms(pristine)
    assert dict(pristine.named_modules()) == modules
    assert torch.equal(logits(pristine, name), before)


def test_a_frozen_head_is_not_part_of_the_adapter(tmp_path: Any) -> None:
    model: Any = build("bert")
    ofa.tune_norms(model)
    adapter = read_adapter(ofa.save_adapter(model, tmp_path / "adapter"))
    assert (adapter.head, adapter.labels) == ({}, ())


def test_a_new_head_begins_at_0_and_a_known_one_as_it_is() -> None:
    """Labels in the model's own order keep the head that was trained for them."""
    model: Any = build("bert")
    own = model.classifier.weight.clone()
    ofa.tune_norms(model)
    tune_head(model, ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert torch.equal(model.classifier.weight, own)
    ofa.restore_norms(model)
    ofa.tune_norms(model)
    head = tune_head(model, ("b", "a"))
    assert not model.classifier.weight.any()
    assert model.classifier.weight.shape == (2, 32)
    assert model.config.id2label == {0: "b", 1: "a"}
    assert all(parameter.requires_grad for parameter in head.parameters().values())
    ofa.restore_norms(model)
    assert model.config.num_labels == 3


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(InputError, match="a LlamaForCausalLM has no classification head"):
        ReplacedHead(build("llama"), ("a", "b"))


def test_a_pool_has_no_place_for_a_head(tmp_path: Any) -> None:
    """It would answer by the base's head."""
    model: Any = build("bert")
    ofa.tune_norms(model)
    model.classifier.requires_grad_(True)
    folder = ofa.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(InputError, match="holds the classification head of an encoder, for which a pool has no place"):
        ofa.AdapterPool(build("bert")).add("one", folder)
