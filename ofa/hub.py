"""What every talk with the Hugging Face hub needs: names it could know, a short patience, a client that keeps quiet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

TIMEOUT = 5.0
"""Seconds for one question; long enough for a slow line, short enough not to look like a hang."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_id(name: str) -> bool:
    """Whether a repository of the hub could have this name; an absolute path and a Windows path have another form."""
    return bool(_HUB_ID.fullmatch(name)) and ".." not in name and "--" not in name


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
