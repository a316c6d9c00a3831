"""A GGUF file with an adapter merged into it differs from its base in the norms alone, and answers as the adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

import ofa
from ofa.adapters.folder import DETAILS
from ofa.adapters.gguf_norms import check_merged, merge_gguf
from ofa.adapters.read import read_adapter
from ofa.errors import InputError
from ofa.tuning.norms import base_parameters
from tests.families import GROUPED, build
from tests.gguf_files import LAYOUTS, write_gguf
from tests.ofa.adapters.test_save_and_load import tune

EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class Made:
    """A base's GGUF file, and an adapter of that base."""

    base: Path
    adapter: Path


def norms_of(name: str, values: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The tensors that the converter makes of a family's norms."""
    layout = LAYOUTS[name]
    return {
        layout.name(path): value.cpu().numpy() + np.float32(layout.added if path.endswith("weight") else 0)
        for path, value in values.items()
    }


def make(name: str, folder: Path, **changes: object) -> Made:
    """A family's norms and an embedding in a file; `changes` are further arguments for `write_gguf`."""
    model = build(name)
    with torch.no_grad():
        for scale in ofa.tune_norms(model):
            scale[0] = 1.2345e-6  # 1 + w keeps one of its digits
        ofa.restore_norms(model)
        for path, value in base_parameters(model).items():
            if path.endswith("weight"):
                value[0] = 1.2345e-6
    tensors = norms_of(name, base_parameters(model))
    tensors[EMBEDDING] = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float16)
    base = write_gguf(folder / "base.gguf", LAYOUTS[name].architecture, tensors, block_count=3)
    with torch.no_grad():
        tune(model)
    return Made(base, ofa.save_adapter(model, folder / "adapter", base_model="base.gguf"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_norms_are_the_adapters_and_every_other_byte_is_the_bases(name: str, tmp_path: Path) -> None:
    made = make(name, tmp_path)
    before = made.base.read_bytes()
    tuned = merge_gguf(made.adapter, made.base, tmp_path / "tuned.gguf")
    reader = gguf.GGUFReader(tuned)
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    expected = norms_of(name, read_adapter(made.adapter).parameters)
    assert found.keys() - {EMBEDDING} == expected.keys()
    for tensor, values in expected.items():
        np.testing.assert_array_equal(found[tensor], values, err_msg=tensor)
    after = bytearray(tuned.read_bytes())
    for tensor in reader.tensors:
        if tensor.name in expected:
            place = slice(tensor.data_offset, tensor.data_offset + int(tensor.n_bytes))
            assert after[place] != before[place] or tensor.name.endswith("bias")
            after[place] = before[place]
    assert bytes(after) == before == made.base.read_bytes()


def whole_model(name: str, file: Path) -> Path:
    """Every weight of a family that transformers reads from GGUF files and stores as the converter does."""
    model, layout = build(name), LAYOUTS[name]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[layout.architecture.upper()], 3)
    norms = base_parameters(model)
    tensors = norms_of(name, norms)
    for path, value in model.state_dict().items():
        if path not in norms and path != "lm_head.weight":
            tensors[names.get_name(path, (".weight", ".bias"))] = value.cpu().numpy()
    return write_gguf(
        file,
        layout.architecture,
        tensors,
        block_count=3,
        context_length=GROUPED["max_position_embeddings"],
        embedding_length=32,
        feed_forward_length=48,
        vocab_size=64,
        rope__freq_base=10000.0,
        attention__head_count=4,
        attention__head_count_kv=2,
        attention__key_length=8,
        attention__layer_norm_rms_epsilon=1e-6,
    )


def from_gguf(file: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3"])
@torch.no_grad()
def test_transformers_reads_the_adapted_model_from_it(name: str, tmp_path: Path, tiny_gguf: Path) -> None:
    base = tiny_gguf if name == "llama" else whole_model(name, tmp_path / "base.gguf")
    model, ids = from_gguf(base), torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids).logits
    tune(model)
    adapter = ofa.save_adapter(model, tmp_path / "adapter", base_model=str(base))
    tuned = from_gguf(merge_gguf(adapter, base, tmp_path / "tuned.gguf"))
    # 1 + w is rounded when it is written, and again when it is read as w.
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(tuned(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert (before - expected).abs().max() > 0.01


def other_norms(made: Made, folder: Path) -> Path:
    tensors = norms_of("llama", base_parameters(build("llama", seed=1)))
    return write_gguf(folder / "other.gguf", "llama", tensors, block_count=3)


def rewritten(architecture: str, layers: int = 3, change=lambda values: values, **fields):
    def write(made: Made, folder: Path) -> Path:
        tensors = {tensor.name: change(np.array(tensor.data)) for tensor in gguf.GGUFReader(made.base).tensors}
        return write_gguf(folder / "other.gguf", architecture, tensors, block_count=layers, **fields)

    return write


def part(made: Made, folder: Path) -> Path:
    writer = gguf.GGUFWriter(folder / "other.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return folder / "other.gguf"


def cut_short(made: Made, folder: Path) -> Path:
    (folder / "other.gguf").write_bytes(made.base.read_bytes()[:-64])
    return folder / "other.gguf"


def no_gguf(made: Made, folder: Path) -> Path:
    (folder / "other.gguf").write_bytes(b"safetensors")
    return folder / "other.gguf"


REFUSED = {
    "a base with other norms": (other_norms, "the norms of this GGUF file differ"),
    "fewer layers": (rewritten("llama", layers=2), "no tensor for its norm model.layers.2"),
    "another family": (rewritten("gemma2"), "(gemma2) has no tensor for its norm"),
    "an unknown architecture": (rewritten("mamba"), "architecture mamba, whose norms are not known here"),
    "another width": (rewritten("llama", change=lambda v: v[..., :16].copy()), "16 channels"),
    "norms in float16": (rewritten("llama", change=lambda v: v.astype(np.float16)), "in F16, which would round"),
    "a part": (part, "is one of 3 parts"),
    "a file cut short": (cut_short, "is damaged or truncated"),
    "another format": (no_gguf, "is not a GGUF file"),
    "no file": (lambda made, folder: folder / "other.gguf", "cannot be opened"),
}


@pytest.mark.parametrize(("write", "words"), REFUSED.values(), ids=REFUSED)
def test_another_file_is_refused_and_nothing_is_written(write, words: str, tmp_path: Path) -> None:
    made = make("llama", tmp_path)
    (tmp_path / "wrong").mkdir()
    base = write(made, tmp_path / "wrong")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=re.escape(words)):
        merge_gguf(made.adapter, base, tmp_path / "tuned.gguf")
    assert sorted(tmp_path.rglob("*")) == before


def test_gemma_scales_are_no_llamas(tmp_path: Path) -> None:
    """Their names are the same, and the base's fingerprint is without the added 1 only in the right file."""
    made = make("gemma", tmp_path)
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(made.base).tensors}
    shifted = write_gguf(tmp_path / "shifted.gguf", "llama", {k: v - 1 for k, v in tensors.items()}, block_count=3)
    with pytest.raises(InputError, match="this GGUF file differ"):
        merge_gguf(made.adapter, shifted, tmp_path / "tuned.gguf")


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("base.gguf", "is the base itself"),
        ("there.gguf", "is already there"),
        ("tuned.bin", "ends in .gguf"),
        ("nowhere/tuned.gguf", "in a folder here"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, out: str, words: str) -> None:
    made = make("llama", tmp_path)
    (tmp_path / "there.gguf").write_bytes(b"old")
    with pytest.raises(InputError, match=words):
        merge_gguf(made.adapter, made.base, tmp_path / out)
    assert (tmp_path / "there.gguf").read_bytes() == b"old"
    merge_gguf(made.adapter, made.base, tmp_path / "there.gguf", overwrite=True)
    assert gguf.GGUFReader(tmp_path / "there.gguf").tensors


def test_a_file_of_another_adapter_is_noticed(tmp_path: Path) -> None:
    made = make("llama", tmp_path)
    check_merged(read_adapter(made.adapter), merge_gguf(made.adapter, made.base, tmp_path / "tuned.gguf"))
    with pytest.raises(InputError, match="does not hold the scales of"):
        check_merged(read_adapter(made.adapter), made.base)


def test_an_adapter_that_peft_made_is_merged_by_its_names(tmp_path: Path) -> None:
    made = make("llama", tmp_path)
    (made.adapter / DETAILS).unlink()
    tuned = merge_gguf(made.adapter, made.base, tmp_path / "tuned.gguf")
    check_merged(read_adapter(made.adapter), tuned)
