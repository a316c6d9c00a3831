"""Leaves `torch.compile` out for a while, in one thread at a time: PyTorch has one stance for all of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ofa.errors import InputError

PATIENCE = 60.0
"""Seconds that a thread waits for another; one that was interrupted in the middle stays where it is."""

_one_thread = threading.RLock()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run everything as it is written.

    Raises:
        InputError: another thread does not come to its end.
        RuntimeError: this is inside of something compiled.
    """
    if not _one_thread.acquire(timeout=PATIENCE):
        raise InputError(
            f"another thread has been looking into a model for {PATIENCE:.0f} s; close() its regularizers if it was "
            "interrupted, or let the threads take turns"
        )
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _one_thread.release()
