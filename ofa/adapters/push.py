"""Push an adapter folder to the Hugging Face hub, with a base model that others can load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ofa.adapters.folder import BASE_CONFIG, CARD, CONFIG, DETAILS, WEIGHTS
from ofa.adapters.model_card import HERE, model_card, named, usage
from ofa.adapters.read import Adapter, read_any_adapter
from ofa.errors import InputError, first_sentence
from ofa.files import Json
from ofa.hub import is_hub_id, quiet_client

if TYPE_CHECKING:
    from huggingface_hub import HfApi

METRICS = ("metrics.jsonl", "training.png")
_MESSAGE = "An adapter made with ofa"


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    metrics: bool = False,
    message: str = _MESSAGE,
    token: str | None = None,
) -> str:
    """Push an adapter to the hub, in one commit.

    Only the adapter's tensors, PEFT's configuration, `ofa_config.json` and the model card are uploaded; in the card,
    the repository's name replaces the folder's.

    Args:
        repo_id: "owner/name", or only the name for a repository of the token's user.
        private: visibility of a new repository; None uses the owner's default.
        base_model: hub id of the base, required if the adapter was made from a local folder or file.
        overwrite: commit to an existing repository.
        metrics: also upload the records and the figure of the training run.
        token: a token with write access; None uses HF_TOKEN or the login of `hf auth login`.

    Returns:
        The URL of the repository.

    Raises:
        InputError: the folder is no adapter, its base is only on this machine, there is no token or it may not write,
            the repository exists and `overwrite` is off, or the hub cannot be reached.

    Example:
        >>> path = ofa.save_adapter(model, folder / "adapter", base_model="owner/base")
        >>> ofa.push_to_hub(path, "owner/reviews-ofa")
        'http.../owner/reviews-ofa'
    """
    adapter = read_any_adapter(folder)
    _check_name(repo_id)
    contents = _contents(adapter, repo_id, _public_base(adapter, base_model))
    if metrics:
        contents |= {name: file.read_bytes() for name in METRICS if (file := adapter.folder / name).is_file()}
    return _upload(contents, _Target(repo_id, private, overwrite, _token(token), message))


@dataclass(frozen=True)
class _Target:
    """The repository, and how to write to it."""

    repo_id: str
    private: bool | None
    overwrite: bool
    token: str = field(repr=False)
    message: str


def _check_name(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(
            f"{repo_id!r} is not a valid hub repository; write owner/name, with letters, digits, '-', '_' and '.'"
        ) from error


def _public_base(adapter: Adapter, given: str | None) -> str:
    """The base's hub id; without the base, others could not use the scales."""
    if given is not None:
        if not is_hub_id(given):
            raise InputError(f"{given!r} is no hub id; give the base model as --base-model owner/name")
        return given
    base = adapter.base
    if base is None or not is_hub_id(base) or Path(base).exists():
        known = f"was made for {base}, which is only on this machine" if base else "does not say its base model"
        raise InputError(
            f"{adapter.folder} {known}, so others could not use it; name the base on the hub with --base-model HUB_ID, "
            "or push the base first"
        )
    return base


def _token(given: str | None) -> str:
    from huggingface_hub import get_token

    token = given or get_token()
    if token is None:
        raise InputError(
            "there is no hub token on this machine; log in with `hf auth login`, or set HF_TOKEN to a token with write "
            "access (https://huggingface.co/settings/tokens)"
        )
    return token


def _contents(adapter: Adapter, repo_id: str, base: str) -> dict[str, bytes]:
    """The files for the repository, with the public name of the base; the folder is not modified."""
    config = json.loads((adapter.folder / CONFIG).read_text(encoding="utf-8"))
    files: dict[str, object] = {CONFIG: {**config, "base_model_name_or_path": base}}
    if adapter.details:
        files[DETAILS] = {**adapter.details, "base_model": base}
    if adapter.labels:
        files[BASE_CONFIG] = json.loads((adapter.folder / BASE_CONFIG).read_text(encoding="utf-8"))
    card = _card(adapter, repo_id, base, config)
    return {
        WEIGHTS: (adapter.folder / WEIGHTS).read_bytes(),
        **{name: (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode() for name, value in files.items()},
        **({CARD: card.encode()} if card else {}),
    }


def _card(adapter: Adapter, repo_id: str, base: str, config: Json) -> str | None:
    """The folder's card, with edits by the user, rewritten for readers of the repository."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    file, task_type = adapter.folder / CARD, config.get("task_type")
    if file.is_file():
        text = file.read_text(encoding="utf-8").replace(named(adapter.base), named(base))
    elif adapter.details:
        text = model_card({**adapter.details, "base_model": base}, task_type, adapter.kind)
    else:
        return None
    try:
        card = ModelCard(_published(text, repo_id, task_type, adapter.base, base))
    except (ValueError, YAMLError) as error:
        raise InputError(
            f"the front matter of {file} cannot be read ({first_sentence(error)}); correct it, or delete the file to "
            "have it generated again"
        ) from error
    card.data.base_model, card.data.base_model_relation = base, "adapter"
    return str(card)


def _published(text: str, repo_id: str, task_type: str | None, local_base: str | None, base: str) -> str:
    for known in (local_base, base, None):  # the folder's own card, or one generated for the base's name on the hub
        own = usage(HERE, task_type, published=False, base=known)
        text = text.replace(own, usage(repo_id, task_type, published=True, base=base))
    return text


def _upload(contents: dict[str, bytes], target: _Target) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=target.token)
    with quiet_client():
        with _explained(target):
            page = api.create_repo(target.repo_id, private=target.private, exist_ok=target.overwrite)
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        with _explained(target):
            _commit(api, page.repo_id, operations, target.message)
    return str(page)


def _commit(api: HfApi, repo_id: str, operations: list[object], message: str) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()  # less than a megabyte
    try:
        api.create_commit(repo_id, operations, commit_message=message)
    finally:
        if shown:
            enable_progress_bars()


@contextmanager
def _explained(target: _Target) -> Iterator[None]:
    """Turn the hub's errors into `InputError`; none of the messages has the token."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise InputError(_refusal(target, error)) from error
    except Exception as error:  # network errors of the hub client have no common base class
        raise InputError(
            f"the hub cannot be reached ({first_sentence(error)}); connect and run the command again, with --overwrite "
            f"if {target.repo_id} was already created"
        ) from error


def _refusal(target: _Target, error: Any) -> str:
    status = error.response.status_code
    if status == 401:
        return (
            "the hub does not know this token; log in again with `hf auth login`, or set HF_TOKEN to one with write "
            "access"
        )
    if status == 403:
        return (
            f"the token may not write to {target.repo_id}; use a repository of your own, or a token with write access "
            "(https://huggingface.co/settings/tokens)"
        )
    if status == 409:
        return f"{target.repo_id} already exists on the hub; choose another name, or commit to it with --overwrite"
    return f"the hub refused {target.repo_id} ({status}: {first_sentence(error)}); try again later or report it there"
