"""Read an adapter folder's task and base, and load the model with the adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ofa.adapters.folder import WEIGHTS, read_config, read_details
from ofa.commands.console import notice
from ofa.commands.options import ChatOptions, DataOptions, ModelOptions
from ofa.errors import InputError
from ofa.files import at_home
from ofa.tasks import Task, with_columns

if TYPE_CHECKING:
    from ofa.models.load import LoadedModel
    from ofa.models.types import Tokenizer


def read_task(folder: Path, text_column: str | None = None, label_column: str | None = None) -> Task:
    """The task an adapter was made for, read without torch; columns given here override its own.

    Raises:
        InputError: the folder is not an adapter of `ofa`, or does not name its task.
    """
    read_config(folder)
    details = read_details(folder)
    if "task" not in details:
        raise InputError(f"{folder} does not name its task (no ofa_config.json); make it with `ofa fit`")
    return with_columns(Task.from_dict(details["task"]), text_column or "", label_column or "")


def task_of_texts(task: Task, where: str) -> Task:
    """The task for texts without columns, with "text" as the column of {text}; `where` names their source.

    Raises:
        InputError: the template has several columns.
    """
    names = task.columns.names
    if len(names) > 1:
        raise InputError(
            f"{where} gives texts without columns, but the template has the columns {' and '.join(names)}: "
            "give --data with a file of these columns"
        )
    return with_columns(task, "text")


def asked_task(folders: Sequence[Path], data: str, how: DataOptions, *, offline: bool) -> Task:
    """The task of the adapters, or of the data and the options if there is no adapter.

    Raises:
        InputError: the adapters were made for different tasks, or the options contradict them; or see `read_task` and
            `training_data`.
    """
    from ofa.commands.data import training_data

    if not folders:
        return training_data(data, how, offline=offline).task
    if how.template or how.labels:
        raise InputError(f"{folders[0]} brings its own template and labels; leave out --template and --labels")
    tasks = [read_task(folder, how.text_column, how.label_column) for folder in folders]
    for folder, task in zip(folders, tasks, strict=True):
        if replace(task, name="any") != replace(tasks[0], name="any"):
            raise InputError(
                f"{folder} was made for another template or other labels than {folders[0]}; "
                "probe adapters of different tasks one by one"
            )
    return tasks[0]


def check_chat(turns: ChatOptions, adapters: Sequence[Path] = ()) -> None:
    """Refuse the options beside an adapter, before the model is loaded.

    Raises:
        InputError: an option is given beside an adapter.
    """
    if adapters and turns != ChatOptions():
        raise InputError(f"{adapters[0]} keeps whether it is a chat: leave out --chat, --no-chat and --system")


def asked_chat(
    task: Task,
    turns: ChatOptions,
    tokenizer: Tokenizer,
    adapters: Sequence[Path] = (),
    demonstrations: Sequence[str] = (),
) -> Task:
    """The task of an adapter as it is; any other in the model's chat template if that is asked for.

    That it is not used is told in one line.

    Raises:
        InputError: see `ofa.evaluation.chat.asked_chat`.
    """
    from ofa.evaluation import chat

    if adapters:
        return task
    asked = chat.asked_chat(task, tokenizer, turns.chat, turns.system, demonstrations=demonstrations)
    tell_chat(task, turns, tokenizer)
    return asked


def tell_chat(task: Task, turns: ChatOptions, tokenizer: Tokenizer) -> None:
    """Tell in one line that the chat template is not used if the options left it open."""
    from ofa.evaluation.chat import is_open

    if is_open(task, tokenizer, turns.chat, turns.system):
        notice("chat template: not used (see --chat)")


def base_of(folder: Path, model: str | None) -> str:
    """The base of an adapter, for `load_model`: `model` if given, else the base that the adapter names.

    Raises:
        InputError: the folder is not an adapter of `ofa`, or its base is a path that no longer exists.
    """
    named = read_config(folder).get("base_model_name_or_path")
    if model is not None:
        return model
    # The embedded default has the hub id of its original, but is quantized: load the same weights again.
    if read_details(folder).get("base_source") == "embedded":
        return "embedded"
    if not named:
        raise InputError(f"{folder} does not say which model it was made for; name it with --model")
    if Path(named).is_absolute() and not Path(named).exists():
        raise InputError(
            f"{folder} was made for the model in {named}, which no longer exists; give its new place with --model"
        )
    return str(named)


def with_base(options: ModelOptions, adapter: Path | None) -> ModelOptions:
    """The options, with the adapter's base as the default model; checked early.

    Raises:
        InputError: see `base_of` and `check_source`.
    """
    from ofa.models.load import check_source

    model = base_of(adapter, options.model) if adapter else options.model
    check_source(model, dtype=options.dtype, device=options.device)
    return replace(options, model=model)


def adapter_digest(folder: Path) -> str:
    """SHA-256 of an adapter's tensors."""
    return hashlib.sha256((at_home(folder) / WEIGHTS).read_bytes()).hexdigest()


def open_model(options: ModelOptions, adapter: Path | None = None) -> LoadedModel:
    """Load the model, with the adapter in it if one is given.

    Raises:
        InputError: the folder is not an adapter of `ofa`, or does not fit the model.
    """
    from ofa.adapters.open import put_adapter
    from ofa.adapters.read import read_any_adapter
    from ofa.models.load import load_model

    read = read_any_adapter(adapter) if adapter else None  # fail before downloading the base
    loaded = load_model(progress=notice, **asdict(options))
    # The stack is never closed: the model keeps the adapter.
    return loaded if read is None else replace(loaded, model=put_adapter(loaded.model, read, ExitStack()))


def open_merged(file: Path, adapter: Path) -> LoadedModel:
    """The GGUF file that the adapter was merged into, run by llama.cpp.

    Raises:
        InputError: the file does not hold the adapter's scales, or llama.cpp is not installed.
    """
    from ofa.adapters.gguf_norms import check_merged
    from ofa.adapters.read import read_adapter
    from ofa.models.llama_cpp import load_llama_cpp

    check_merged(read_adapter(adapter), file)
    return load_llama_cpp(at_home(file))
