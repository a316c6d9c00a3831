"""A few tokens through the first layers of a model, to see what its modules really do."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ofa import sharding
from ofa.errors import InputError


class _Done(Exception):
    """Ends the trial run: a signal, not an error."""


@torch.no_grad()
def run(model: nn.Module, until: str) -> None:
    """Run the model in evaluation mode up to the end of the module `until`; hooks see what goes by.

    A sharded model is run to its own end: a forward pass that breaks off would leave some parameters gathered.
    """

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Done

    if sharding.is_sharded(model):
        with _evaluating(model):
            model(**_inputs(model))
        sharding.reshard(model)
        return
    handle = model.get_submodule(until).register_forward_hook(stop)
    try:
        with _evaluating(model):
            model(**_inputs(model))
    except _Done:
        pass
    finally:
        handle.remove()


def close(actual: Tensor, expected: Tensor) -> bool:
    """Equal up to a few roundings of the stream: sums and norms are computed in another order here and there."""
    if actual.numel() != expected.numel():
        return False
    tolerance = max(1e-4, 4 * max(torch.finfo(actual.dtype).eps, torch.finfo(expected.dtype).eps))
    actual, expected = actual.detach().float(), shaped(expected, actual).detach().float()
    scale = max(float(expected.abs().max()), math.ulp(1.0))
    return bool((actual - expected).abs().max() <= tolerance * scale)


def shaped(tensor: Tensor, like: Tensor) -> Tensor:
    """OPT flattens (batch, tokens) inside its layer; the values are what is compared."""
    return tensor.reshape(like.shape)


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    config: Any = model.config
    parameter = next(model.parameters())
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        pixels = torch.linspace(-1, 1, config.num_channels * size * size, device=parameter.device)
        return {"pixel_values": pixels.view(1, config.num_channels, size, size).to(parameter.dtype)}
    return {"input_ids": torch.arange(1, 5, device=parameter.device).unsqueeze(0)}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then each module's own mode again: dropout would contradict any wiring.

    Nothing is compiled for a run that stops in the middle and happens once.
    """
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with force_eager():
            yield
    finally:
        for module in training:
            module.training = True


PATIENCE = 60.0
"""Seconds that a thread waits for another; one that was interrupted in the middle stays where it is."""


_one_thread = threading.RLock()


@contextmanager
def force_eager() -> Iterator[None]:
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
