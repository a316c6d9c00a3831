"""Fingerprints detect every leftover of a method in a model, and only these."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ofa.comparison.fingerprint import Fingerprint, bit_sums


def one_ulp(model):
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(weight[3, 5], weight.new_tensor(2.0))


def equal_but_another(model):
    norm = model.model.norm
    norm.weight = nn.Parameter(norm.weight.detach().clone())


def wrapped(model):
    layer = model.model.layers[0].self_attn
    layer.q_proj = nn.Sequential(layer.q_proj)


LEFT = {
    "one weight by one ulp": (one_ulp, "model.layers.1.mlp.down_proj.weight"),
    "an equal norm scale that is another object": (equal_but_another, "model.norm.weight"),
    "a frozen parameter": (lambda m: m.lm_head.weight.requires_grad_(False), "lm_head.weight"),
    "a gradient": (lambda m: setattr(m.lm_head.weight, "grad", torch.zeros_like(m.lm_head.weight)), "lm_head.weight"),
    "training mode": (lambda m: m.model.layers[2].mlp.train(), "model.layers.2.mlp"),
    "a hook": (lambda m: m.model.layers[0].register_forward_hook(lambda *args: None), "model.layers.0"),
    "a pre-hook": (lambda m: m.model.norm.register_forward_pre_hook(lambda *args: None), "model.norm"),
    "a wrapped module": (wrapped, "model.layers.0.self_attn.q_proj"),
    "a module more": (lambda m: m.add_module("extra", nn.Identity()), "extra"),
    "another computation": (lambda m: setattr(m.model.layers[0].self_attn, "scaling", 3.0), "logits of a trial run"),
}


@pytest.mark.parametrize("left", LEFT)
def test_what_is_left_behind_is_named(tiny_model, left):
    model, _ = tiny_model
    change, words = LEFT[left]
    before = Fingerprint.of(model)
    assert before.difference(Fingerprint.of(model)) is None
    change(model)
    difference = before.difference(Fingerprint.of(model))
    assert difference is not None
    assert words in difference


def test_taking_it_changes_nothing(tiny_model):
    """Computing a fingerprint must not change the model."""
    model, _ = tiny_model
    model.model.layers[0].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Fingerprint.of(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.model.layers[0].training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(1,), (3, 5), (7,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_every_bit_counts_in_every_dtype_and_size(shape, dtype):
    """Oracle: the bytes as 64-bit words, the rest one by one, summed by Python modulo 2⁶⁴.

    A slice of a larger storage starts at an unaligned offset.
    """
    base = torch.arange(1, 40).to(dtype)
    count = torch.Size(shape).numel()
    for tensor in (base[:count].reshape(shape), base[1 : 1 + count].reshape(shape)):
        octets = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
        whole = len(octets) // 8 * 8
        words = [int.from_bytes(octets[i : i + 8], "little", signed=True) for i in range(0, whole, 8)]
        assert bit_sums([tensor])[0] % 2**64 == (sum(words) + sum(octets[whole:])) % 2**64


def test_weights_are_told_apart_by_value_and_dtype_not_by_object(tiny_model):
    model, _ = tiny_model
    first = Fingerprint.of(model).weights
    equal_but_another(model)
    assert Fingerprint.of(model).weights == first
    one_ulp(model)
    second = Fingerprint.of(model).weights
    assert len({first, second, Fingerprint.of(model.bfloat16()).weights}) == 3
