"""Write adapter folders, and checkpoints with an adapter merged in, completely or not at all."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from torch import Tensor

from ofa import sharding
from ofa._version import __version__
from ofa.adapters.folder import BASE_CONFIG, CARD, CONFIG, DETAILS, WEIGHTS
from ofa.adapters.model_card import model_card
from ofa.adapters.read import not_finite, plain_key
from ofa.errors import InputError
from ofa.files import WRITE_ERRORS, Json, at_home, claimed_folder, json_writer, reason, text_writer, write_together
from ofa.models.types import CausalLM, Tokenizer


def write_adapter(
    folder: str | Path,
    tensors: dict[str, Tensor],
    config: Json,
    details: dict[str, object],
    *,
    base_config: Json | None,
    overwrite: bool,
) -> Path:
    """Write tensors, PEFT's configuration, `ofa_config.json` and the model card; in a distributed run, on rank 0.

    `base_config` is written for an adapter with a head.

    Raises:
        InputError: a tensor is not finite, or the folder cannot be written or is not empty.
    """
    from safetensors.torch import save_file

    broken = not_finite(tensors)
    if broken:
        raise InputError(
            f"{plain_key(broken)} is not finite because the training diverged, so no adapter was written to {folder}; "
            "train again with a lower learning rate"
        )
    known = {**details, "versions": versions()}

    def write() -> None:
        with claimed_folder(at_home(folder), overwrite=overwrite) as target:
            write_together(
                {
                    target / WEIGHTS: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
                    target / DETAILS: json_writer(known),
                    target / CARD: text_writer(model_card(known, config["task_type"], config["peft_type"])),
                    **({target / BASE_CONFIG: json_writer(base_config)} if base_config else {}),
                    # Last: this file makes the folder an adapter.
                    target / CONFIG: json_writer(config),
                }
            )

    sharding.on_first_rank(f"writing {folder}", _exact_digest(tensors), write)
    return at_home(folder)


def write_checkpoint(
    model: CausalLM, state: dict[str, Tensor] | None, out: str | Path, *, tokenizer: Tokenizer | None, overwrite: bool
) -> Path:
    """Write a model, with `state` in place of its own tensors, and its tokenizer.

    Raises:
        InputError: the folder cannot be written, or is not empty.
    """
    with claimed_folder(out, overwrite=overwrite) as target:
        staging = target / ".partial"
        try:
            model.save_pretrained(staging, state_dict=state)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
            for file in sorted(staging.iterdir()):
                shutil.move(file, target / file.name)
        except WRITE_ERRORS as error:
            raise InputError(f"the checkpoint {target} cannot be written ({reason(error)}); free its disk") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def versions() -> dict[str, str]:
    """Versions of the packages that an adapter was made with."""
    from importlib.metadata import version

    return {"ofa-adapt": __version__, **{name: version(name) for name in ("torch", "transformers", "peft")}}


def _exact_digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for value in tensors.values():
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
