"""Norm scales train on a base in 4 or 8 bits (bitsandbytes), and their adapter fits every form of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import ofa
from ofa import InputError
from tests import families
from tests.device import DEVICE
from tests.ofa.traces import EVERY

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # PEFT of every norm, and tunes it
    pytest.mark.filterwarnings("ignore:.*inputs will be cast from.*"),  # LLM.int8 in every layer
]

FORMS: dict[str, dict[str, Any]] = {
    "fp4": {"load_in_4bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def quantized(folder: Path, form: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The base of a folder, quantized while loading, in evaluation mode."""
    config = BitsAndBytesConfig(**FORMS[form])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 300, (2, 8), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return {"input_ids": ids, "labels": ids}


def train(model: nn.Module) -> list[Tensor]:
    """Three steps with both terms, and evaluation between them; returns each scale's total change."""
    params = ofa.tune_norms(model)
    start = [param.detach().clone() for param in params]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)
    with ofa.fused_regularizers(model, 1e-2, 1e-3) as reg:
        # Inputs rounded to 8 bits differ by more than the closed form's recognition tolerates in float32.
        rounds = any(type(module).__name__ == "Linear8bitLt" for module in model.modules())
        assert reg.estimator == (
            "hutchinson" if rounds and next(model.parameters()).dtype == torch.float32 else "exact"
        )
        for _ in range(3):
            loss = model(**batch()).loss + reg.penalty()
            loss.backward()
            assert torch.isfinite(loss)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model(**batch())  # where the CPU supports it, 4-bit layers would pack their weights here
    return [(param.detach() - old).abs().max() for param, old in zip(params, start, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_scale_trains_and_the_adapter_opens(
    form: str, dtype: torch.dtype, tiny_folder: Path, tmp_path: Path
) -> None:
    """Adam changes each scale by its rate in each step, and PEFT loads the adapter."""
    model = quantized(tiny_folder, form, dtype)
    moved = train(model)
    assert len(moved) == 7
    assert min(moved) > 1e-2

    ofa.save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        tuned = model(**batch()).logits
        opened = PeftModel.from_pretrained(quantized(tiny_folder, form, dtype), tmp_path / "adapter").eval()
        found = opened(**batch()).logits
    # PEFT rounds seven scales to the base's dtype, and 4-bit layers may be packed there, with scales of their blocks in
    # bfloat16: some fifty roundings of 2⁻⁹ in a row, which add up as their root.
    assert float((found - tuned).float().norm()) <= 2**-6 * float(tuned.float().norm())
    ofa.restore_norms(model)
    assert not any(parameter.dtype == torch.float32 for parameter in model.parameters()) or dtype == torch.float32


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_an_adapter_fits_its_base_in_full_precision(form: str, tiny_folder: Path, tmp_path: Path) -> None:
    """An adapter trained on the quantized base is loaded into, and merged with, the published base."""
    model = quantized(tiny_folder, form)
    train(model)
    ofa.save_adapter(model, tmp_path / "adapter", base_model=str(tiny_folder))
    full = AutoModelForCausalLM.from_pretrained(tiny_folder).to(DEVICE)
    ofa.load_adapter(full, tmp_path / "adapter")
    ofa.merge(str(tiny_folder), tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").to(DEVICE)
    with torch.no_grad():
        assert torch.equal(merged(**batch()).logits, full(**batch()).logits)
    own = model.get_parameter("model.norm.weight")
    assert torch.equal(full.get_parameter("model.norm.weight"), own)


@pytest.mark.parametrize(("form", "close"), [("fp4", 1e-4), ("nf4", 1e-4), ("int8", 0.05)])
def test_the_closed_form_has_the_dequantized_weights(form: str, close: float, tiny_folder: Path) -> None:
    """Traces and gradient are those of the plain model with the dequantized weights; int8 also rounds what it reads."""
    dtype = torch.bfloat16 if form == "int8" else torch.float32
    model, plain = quantized(tiny_folder, form, dtype), AutoModelForCausalLM.from_pretrained(tiny_folder).to(DEVICE)
    ofa.tune_norms(model)  # before any pass, in which 4-bit layers would pack their weights
    for path, module in model.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            plain.get_submodule(path).weight.data = dequantized(module)
    found = []
    for one in (model, plain):
        parameters = ofa.tune_norms(one)
        with ofa.fused_regularizers(one, 0.0, 1.0, estimator="exact") as reg:
            one(**batch())
            slopes = torch.autograd.grad(reg.penalty(), parameters[:-1])
            found.append((reg.measurements.traces.flatten(), torch.cat(slopes)))
    for mine, theirs in zip(*found, strict=True):
        assert float((mine - theirs).norm()) <= close * float(theirs.norm())


def dequantized(module: Any) -> Tensor:
    """W, from the layer's outputs for unit vectors."""
    if type(module).__name__ == "Linear8bitLt":
        return module.weight.data.float() * (module.weight.SCB.view(-1, 1) / 127)
    return module(torch.eye(module.in_features)).detach().mT


def test_packing_is_disabled_while_norms_are_tuned(tiny_folder: Path) -> None:
    """A base that was run before, and is packed, is refused before any change."""
    model = quantized(tiny_folder, "nf4")
    layer: Any = model.get_submodule("model.layers.0.mlp.down_proj")
    layer.support_avx512bf16_for_cpu = True  # as on a processor with AVX512-BF16
    for _ in range(2):
        ofa.tune_norms(model)
    assert not layer.support_avx512bf16_for_cpu
    ofa.restore_norms(model)
    assert layer.support_avx512bf16_for_cpu
    layer.weight.quant_state.packing_format_for_cpu = True
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj was packed for inference.*load the model again"):
        ofa.tune_norms(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


@pytest.mark.parametrize("kind", ["exact", "hutchinson", "hutchinson, full"])
def test_a_branch_without_a_gradient_is_refused(kind: str) -> None:
    """After an inference-only layer, the scales before it would get no gradient of the loss."""
    model = families.build("llama")
    ofa.tune_norms(model)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output.detach(), prepend=True)
    with ofa.fused_regularizers(model, **EVERY[kind], epsilon=1e-3):
        with pytest.raises(InputError, match=r"the output of model\.layers\.1\.mlp has no gradient to"):
            model(**families.inputs("llama"))
        with torch.no_grad():
            model(**families.inputs("llama"))
