"""Capture a computation as a CUDA graph: the only lines that need a GPU. Tests put a recorder in their place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ofa.regularizers.closed_form import attention_interface

SWITCH = "OFA_GRAPHS"
"""Environment variable; "off" runs every step without graphs."""

Run = Callable[[], None]


class CannotCaptureError(Exception):
    """The computation cannot be captured; the message says why."""


class Capture:
    """Records computations whose inputs and outputs stay where they are in memory, by `torch.cuda.graph`.

    All graphs share one pool of memory, since they run one after another.
    """

    def __init__(self) -> None:
        self._pool: object = None

    def rehearse(self, run: Run) -> None:
        """Run once on a side stream, as it will be captured.

        A capture that fails leaves PyTorch's random numbers and allocator in the middle of it, so it must not fail.

        Raises:
            CannotCaptureError: the computation waits for the device, or fails.
        """
        aside, mode = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
        aside.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(aside):
                run()
        except RuntimeError as error:
            raise CannotCaptureError(str(error)) from error
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.current_stream().wait_stream(aside)

    def record(self, run: Run) -> Run:
        """Capture `run`, which computes nothing yet, and return its replay.

        A replay computes the same tensors in place from what the inputs hold then.

        Raises:
            CannotCaptureError: the computation cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):  # type: ignore[arg-type]
                run()
        except RuntimeError as error:
            raise CannotCaptureError(str(error)) from error
        self._pool = self._pool or graph.pool()
        replay: Run = graph.replay
        return replay


def capture_for(device: torch.device) -> Capture:
    """What captures on a device.

    Raises:
        CannotCaptureError: nothing does, or the environment turns it off.
    """
    if os.environ.get(SWITCH) == "off":
        raise CannotCaptureError(f"{SWITCH}=off in the environment")
    if device.type != "cuda":
        raise CannotCaptureError(f"the model is on {device.type}, and CUDA graphs need a CUDA GPU")
    return Capture()


@contextmanager
def as_captured(*, packed: bool) -> Iterator[None]:
    """Attention masks as in a capture, where no batch can be read: made from the mask of each batch, never left out.

    Args:
        packed: whether a row may be several sequences. Without a mask and positions of the caller it is one, which
            transformers would look up in the positions that the model makes.
    """
    from transformers import masking_utils
    from transformers.utils import import_utils

    swaps: list[tuple[Any, str, object]] = [(import_utils, "is_cuda_stream_capturing", lambda: True)]
    swaps += [(attention_interface, "capturing", lambda tensor: True)]
    swaps += [] if packed else [(masking_utils, "find_packed_sequence_indices", lambda positions: None)]
    own = [(module, name, getattr(module, name)) for module, name, _ in swaps]
    try:
        for module, name, value in swaps:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in own:
            setattr(module, name, value)
