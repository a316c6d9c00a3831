"""Name the files of an adapter folder, and read its configuration without importing torch."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from ofa.errors import InputError
from ofa.files import Json, at_home

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
DETAILS = "ofa_config.json"
CARD = "README.md"
BASE_CONFIG = "base_config.json"
"""The base's config.json with the labels of a head that is in the adapter: what transformers builds the head by."""

NORMS = "LN_TUNING"
KINDS = {NORMS: "LN-tuning", "LORA": "LoRA", "IA3": "IA3", "PROMPT_TUNING": "prompt-tuning"}
"""PEFT types of the adapters that are written and opened here, and their names in a text."""

METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.safetensors"
"""State of an unfinished run; a finished run replaces it by the adapter."""


def read_config(folder: str | Path, kinds: Collection[str] = tuple(KINDS)) -> Json:
    """Read `adapter_config.json` of an adapter of one of these `kinds`.

    Raises:
        InputError: the folder is not an adapter folder, or holds another kind of adapter.
    """
    path = at_home(folder)
    config = _read_json(path / CONFIG, f"{path} is not an adapter folder")
    kind = config.get("peft_type")
    if kind not in kinds:
        remedy = f"give an adapter of the kind {' or '.join(KINDS[one] for one in kinds)}"
        if kind in ("LORA", "IA3"):
            remedy += f", or make a checkpoint of this one with `ofa merge {path} --out FOLDER` and use that"
        raise InputError(f"{path} holds a {KINDS.get(str(kind), kind)} adapter, which cannot be used here; {remedy}")
    return config


def read_details(folder: str | Path) -> Json:
    """Read `ofa_config.json`; empty if there is none, as in a folder that PEFT wrote.

    Raises:
        InputError: the file cannot be read.
    """
    file = at_home(folder) / DETAILS
    return _read_json(file, "") if file.exists() else {}


def read_labels(folder: str | Path) -> tuple[str, ...]:
    """The labels of the head in an adapter, in the order of its logits.

    Raises:
        InputError: the file that names them is missing or damaged.
    """
    path = at_home(folder) / BASE_CONFIG
    names = _read_json(path, f"{folder} lacks the labels of its head").get("id2label")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{path} names no labels; save the adapter again")
    return tuple(str(names[index]) for index in sorted(names, key=int))


def _read_json(path: Path, missing: str) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{missing}: it has no {path.name}; give the folder that `ofa fit` wrote") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy or save the adapter again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object; copy or save the adapter again")
    return value
