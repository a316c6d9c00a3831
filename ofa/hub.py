"""Questions to the Hugging Face hub: one short request for a repository, names it could have, a quiet client."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from ofa.errors import InputError, first_sentence

TIMEOUT = 5.0
"""Seconds for one question; long enough for a slow line, short enough not to look like a hang."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_id(name: str) -> bool:
    """Whether a repository of the hub could have this name; an absolute path and a Windows path have another form."""
    return bool(_HUB_ID.fullmatch(name)) and ".." not in name and "--" not in name


@dataclass(frozen=True)
class Answer:
    """The files of a repository, or the reason why the hub does not say."""

    files: tuple[str, ...] = ()
    unreachable: str | None = None


def ask(kind: Literal["model", "data set"], repo_id: str, *, offline: bool, otherwise: str) -> Answer:
    """Ask the hub once, with a short timeout: without a connection, the loaders would retry for minutes.

    With `offline` it is not asked. `otherwise` is what to do without the repository.

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
    except Exception as error:  # the network errors of the hub's client have no base class of their own
        return Answer(unreachable=f"the hub cannot be reached: {first_sentence(error)}")
    return Answer(tuple(file.rfilename for file in info.siblings or ()))


def is_switched_off() -> bool:
    """Whether the environment says not to use the network (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def quiet_client() -> Iterator[None]:
    """Only errors of the client reach the terminal: what its warnings are about, our own sentence says."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
