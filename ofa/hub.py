"""Query the Hugging Face hub: one short request for a repository, and valid names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ofa.errors import InputError, first_sentence

TIMEOUT = 5.0
"""Timeout of a request in seconds: enough for a slow connection, but too short to look like a hang."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_id(name: str) -> bool:
    """True if a hub repository could have this name; absolute and Windows paths cannot match."""
    return bool(_HUB_ID.fullmatch(name)) and ".." not in name and "--" not in name


@dataclass(frozen=True)
class Answer:
    """The files of a repository, or the reason why the hub did not answer."""

    files: tuple[str, ...] = ()
    unreachable: str | None = None


def ask(kind: Literal["model", "data set"], repo_id: str, *, offline: bool, otherwise: str) -> Answer:
    """Ask the hub once, with a short timeout: without a connection, the loaders would retry for minutes.

    With `offline`, no request is sent. `otherwise` is the alternative that the error message suggests.

    Raises:
        InputError: the hub has no such repository, or access to it is restricted.
    """
    if offline:
        return Answer(unreachable="offline mode is on")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = (HfApi().model_info if kind == "model" else HfApi().dataset_info)(repo_id, timeout=TIMEOUT)
    except GatedRepoError as error:
        raise InputError(
            f"the {kind} {repo_id} is gated; accept its terms on its page and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no public {kind} {repo_id} on the hub; check its name, log in with `hf auth login` if it is "
            f"private, or {otherwise}"
        ) from error
    except Exception as error:  # network errors of the hub's client have no common base class
        return Answer(unreachable=f"the hub cannot be reached: {first_sentence(error)}")
    return Answer(tuple(file.rfilename for file in info.siblings or ()))


def is_switched_off() -> bool:
    """True if the environment forbids network access (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
