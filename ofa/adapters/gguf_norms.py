"""Write an adapter's scales into a GGUF file of its base, replacing only the base's norms.

GGUF files store norms in float32 at every quantization, so nothing is requantized. The `gguf` package, whose names
llama.cpp's converter uses, maps norms to tensors; the base's fingerprint verifies the mapping for each file.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ofa.adapters.base_norms import fingerprints_of
from ofa.adapters.read import Adapter, read_adapter, refuse_head
from ofa.errors import InputError, first_sentence
from ofa.files import at_home, write_atomically
from ofa.models.embedded import check_gguf

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor, TensorNameMap

_ADDED = dict.fromkeys(
    (
        *("llama", "qwen2", "qwen3", "qwen3moe", "smollm3", "granite", "phi2", "phi3", "olmo2", "command-r"),
        *("gpt2", "gptneox", "gpt-oss", "falcon", "bert"),
    ),
    0.0,
) | dict.fromkeys(("gemma", "gemma2", "gemma3"), 1.0)
"""Map the architecture of a file to the offset that the converter adds to norm weights: Gemma's scale is 1 + w."""


def merge_gguf(adapter: str | Path | Adapter, base: str | Path, out: str | Path, *, overwrite: bool = False) -> Path:
    """Copy a GGUF file of the adapter's base with the adapter's scales in it; all other bytes are unchanged.

    Args:
        base: the base converted by llama.cpp, at any quantization; or the file that the adapter was tuned on.

    Returns:
        The path of the new file.

    Raises:
        InputError: the file is damaged, split, of another base or an unknown architecture, or has a norm that is not
            float32; `out` exists and `overwrite` is off, or cannot be written.

    Example:
        >>> base = ofa.load_model(str(gguf))
        >>> path = ofa.save_adapter(base.model, folder / "adapter")
        >>> ofa.merge_gguf(path, gguf, folder / "tuned.gguf").name
        'tuned.gguf'
    """
    read = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    refuse_head(read, "a GGUF file")
    source, target = at_home(base), check_gguf_out(out, base, overwrite=overwrite)
    norms = _norms_in(source, read)
    _check_base(norms, read)

    def write(path: Path) -> None:
        shutil.copyfile(source, path)
        with path.open("r+b") as file:
            for norm in norms:
                file.seek(norm.tensor.data_offset)
                file.write(norm.tuned.tobytes())

    write_atomically(target, write)
    return target


def check_gguf_out(out: str | Path, base: str | Path, *, overwrite: bool) -> Path:
    """The path of the GGUF file to write.

    Raises:
        InputError: it does not end in .gguf, its folder does not exist, it is the base itself, or it exists and
            `overwrite` is off.
    """
    target = at_home(out)
    if target.suffix.lower() != ".gguf" or target.is_dir() or not target.parent.is_dir():
        raise InputError(f"{target} cannot be written as a GGUF file: give a name that ends in .gguf, in a folder here")
    if target.exists() and at_home(base).exists() and target.samefile(at_home(base)):
        raise InputError(f"{target} is the base itself, which is kept; choose another name")
    if target.exists() and not overwrite:
        raise InputError(f"{target} is already there; choose another name or pass --overwrite")
    return target


def check_merged(adapter: Adapter, file: str | Path) -> None:
    """Check that a GGUF file holds exactly the adapter's scales.

    Raises:
        InputError: it holds others, or cannot be read.
    """
    path = at_home(file)
    if not all(np.array_equal(norm.tensor.data, norm.tuned) for norm in _norms_in(path, adapter)):
        raise InputError(
            f"{path} does not hold the scales of {adapter.folder}; make it with `ofa merge {adapter.folder} --gguf "
            f"{path} --out TUNED.gguf` if it is the base's"
        )


@dataclass(frozen=True)
class _Norm:
    """A scale or shift: its path in the adapter, its tensor in the file, and the adapter's values for it."""

    path: str
    tensor: ReaderTensor
    added: float
    tuned: np.ndarray


def _norms_in(file: Path, adapter: Adapter) -> list[_Norm]:
    reader = _open(file)
    architecture, names = _names(reader, file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    norms = []
    for path, value in adapter.parameters.items():
        module, _, kind = path.rpartition(".")
        # The converter removes a classifier's prefix from the names of its encoder.
        name = names.get_name(module) or names.get_name(module.partition(".")[2])
        tensor = tensors.get(f"{name}.{kind}")
        if tensor is None:
            raise InputError(
                f"{adapter.folder} was made for {adapter.base or 'another model'}, and {file} ({architecture}) has no "
                f"tensor for its norm {path}; give a GGUF file of that base"
            )
        _check_tensor(file, tensor, path, value.numel())
        added = _ADDED[architecture] if kind == "weight" else 0.0
        norms.append(_Norm(path, tensor, added, (value.float().numpy() + np.float32(added)).astype(tensor.data.dtype)))
    return norms


def _names(reader: GGUFReader, file: Path) -> tuple[str, TensorNameMap]:
    import gguf

    architecture = str(_field(reader, gguf.Keys.General.ARCHITECTURE))
    if architecture not in _ADDED:
        raise InputError(
            f"{file} holds a model of the architecture {architecture}, whose norms are not known here; known are "
            f"{', '.join(sorted(_ADDED))}: write a checkpoint with `ofa merge ADAPTER --out FOLDER` and convert that "
            "with llama.cpp"
        )
    parts = _field(reader, gguf.Keys.Split.LLM_KV_SPLIT_COUNT) or 1
    if parts > 1:
        raise InputError(
            f"{file} is one of {parts} parts of a model; join them with `llama-gguf-split --merge`, and give that file"
        )
    kind = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    layers = _field(reader, gguf.Keys.LLM.BLOCK_COUNT.format(arch=architecture))
    return architecture, gguf.get_tensor_name_map(kind, int(layers or 0))


def _check_tensor(file: Path, tensor: ReaderTensor, path: str, width: int) -> None:
    if tensor.n_elements != width:
        raise InputError(
            f"{tensor.name} of {file} has {tensor.n_elements} channels and {path} of the adapter {width}; give a GGUF "
            "file of the adapter's base"
        )
    if tensor.tensor_type.name != "F32":
        raise InputError(
            f"{file} holds {tensor.name} in {tensor.tensor_type.name}, which would round the tuned scales; convert the "
            "base again with llama.cpp, which keeps norms in float32"
        )


def _check_base(norms: list[_Norm], adapter: Adapter) -> None:
    values = {norm.path: torch.from_numpy(norm.tensor.data.astype(np.float32) - norm.added) for norm in norms}
    found = fingerprints_of(values, {norm.path: norm.added for norm in norms})
    expected = {adapter.details[name] for name in found if name in adapter.details}
    if expected and expected.isdisjoint(found.values()):
        raise InputError(
            f"{adapter.folder} was made for {adapter.base or 'another model'}, and the norms of this GGUF file differ; "
            "give a file of that base without an adapter in it"
        )


def _open(file: Path) -> GGUFReader:
    check_gguf(file)
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except Exception as error:  # on a damaged file the reader raises errors of any type
        raise InputError(f"{file} is damaged or truncated ({first_sentence(error)}); fetch it again") from error


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()
