"""An adapter folder and its base model, ready to predict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ofa.commands.console import notice
from ofa.errors import InputError
from ofa.tasks import Task, with_columns


@dataclass(frozen=True)
class Adapted:
    """The base model with an adapter's scales in it, its tokenizer, and the task it was made for."""

    model: Any
    tokenizer: Any
    task: Task
    details: dict[str, Any]
    source: str


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
    from ofa.adapters import load_adapter, read_adapter

    adapter = read_adapter(folder)
    if "task" not in adapter.details:
        raise InputError(f"{folder} does not say its task (no ofa_config.json); make it with `ofa fit`")
    task = with_columns(Task.from_dict(adapter.details["task"]), text_column or "", label_column or "")
    from ofa.models import load_model

    # The embedded default carries the hub id of the model it was made from, but is quantized: go back to the same.
    embedded = adapter.details.get("base_source") == "embedded"
    loaded = load_model(
        model or ("embedded" if embedded else adapter.base),
        dtype=dtype,
        device=device,
        offline=offline,
        trust_remote_code=trust_remote_code,
        progress=notice,
    )
    load_adapter(loaded.model, adapter)
    return Adapted(loaded.model, loaded.tokenizer, task, adapter.details, loaded.source)
