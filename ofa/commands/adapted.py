"""An adapter folder and its base model, ready to predict."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ofa.adapters.folder import WEIGHTS, read_config, read_details
from ofa.commands.console import notice
from ofa.errors import InputError
from ofa.files import at_home
from ofa.tasks import Task, with_columns


@dataclass(frozen=True)
class Adapted:
    """The base model with an adapter's scales in it, its tokenizer, and the task it was made for."""

    model: Any
    tokenizer: Any
    task: Task
    details: dict[str, Any]
    source: str


def read_task(folder: Path, text_column: str | None = None, label_column: str | None = None) -> Task:
    """The task an adapter was made for, without the libraries that load the adapter, with other columns if given.

    Raises:
        InputError: the folder is no adapter of ours, or does not say its task.
    """
    read_config(folder)
    details = read_details(folder)
    if "task" not in details:
        raise InputError(f"{folder} does not say its task (no ofa_config.json); make it with `ofa fit`")
    return with_columns(Task.from_dict(details["task"]), text_column or "", label_column or "")


def base_of(folder: Path, model: str | None) -> str:
    """What to load an adapter into, for `load_model`: `model` where it is given, else the base that it names.

    Raises:
        InputError: the folder is no adapter of ours, or its base is a path that leads nowhere any more.
    """
    named = read_config(folder).get("base_model_name_or_path")
    if model is not None:
        return model
    # The embedded default carries the hub id of the model it was made from, but is quantized: go back to the same.
    if read_details(folder).get("base_source") == "embedded":
        return "embedded"
    if not named:
        raise InputError(f"{folder} does not say which model it was made for; name it with --model")
    if Path(named).is_absolute() and not Path(named).exists():
        raise InputError(
            f"{folder} was made for the model in {named}, which is not there any more; give its new place with --model"
        )
    return str(named)


def adapter_digest(folder: Path) -> str:
    """SHA-256 of an adapter's scales."""
    return hashlib.sha256((at_home(folder) / WEIGHTS).read_bytes()).hexdigest()


def open_adapter(
    folder: Path,
    model: str | None,
    *,
    dtype: str,
    device: str,
    offline: bool,
    trust_remote_code: bool,
    text_column: str | None = None,
    label_column: str | None = None,
) -> Adapted:
    """Load the adapter's base, or `model` in its place, and put the adapter's scales in.

    The task reads the columns that the adapter was made with, unless others are given.

    Raises:
        InputError: the folder is no adapter of ours, or does not fit the model.
    """
    from ofa.adapters.save_and_load import load_adapter, read_adapter

    task = read_task(folder, text_column, label_column)
    adapter = read_adapter(folder)
    from ofa.models.load import load_model

    loaded = load_model(
        base_of(folder, model),
        dtype=dtype,
        device=device,
        offline=offline,
        trust_remote_code=trust_remote_code,
        progress=notice,
    )
    load_adapter(loaded.model, adapter)
    return Adapted(loaded.model, loaded.tokenizer, task, adapter.details, loaded.source)
