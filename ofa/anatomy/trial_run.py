"""Runs a few tokens through the first layers of a model, to check what its modules compute."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ofa import sharding

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


_one_thread = threading.RLock()
"""Held during a trial run, since the stance of `torch.compile` is global."""


class _Done(Exception):
    """Ends the trial run; not an error."""


@torch.no_grad()
def run(model: nn.Module, until: str) -> None:
    """Run the model in evaluation mode up to the end of the module `until`; the caller's hooks read the tensors.

    A sharded model is run to its end: an aborted forward pass would leave parameters gathered.
    """

    def stop(module: nn.Module, args: object, output: object) -> None:
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
    """Whether two tensors are equal up to a few roundings, since models sum in different orders."""
    if actual.numel() != expected.numel():
        return False
    tolerance = max(1e-4, 4 * max(torch.finfo(actual.dtype).eps, torch.finfo(expected.dtype).eps))
    actual, expected = actual.detach().float(), shaped(expected, actual).detach().float()
    scale = max(float(expected.abs().max()), math.ulp(1.0))
    return bool((actual - expected).abs().max() <= tolerance * scale)


def shaped(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in another's shape: OPT flattens (batch, tokens) inside its layer."""
    return tensor.reshape(like.shape)


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    config: PreTrainedConfig = model.config
    parameter = next(model.parameters())
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        pixels = torch.linspace(-1, 1, config.num_channels * size * size, device=parameter.device)
        return {"pixel_values": pixels.view(1, config.num_channels, size, size).to(parameter.dtype)}
    return {"input_ids": torch.arange(1, 5, device=parameter.device).unsqueeze(0)}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (dropout would contradict any wiring) without compiling; then each module's own mode again."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with _one_thread, torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True
