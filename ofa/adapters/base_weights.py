"""Digest the frozen weights that an adapter was made for, from a few values of every tensor.

Fine-tuned models often keep the norms of their base, so the norms alone do not identify it. Hashing all weights would
cost more than loading them; training a layer changes the sampled values too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ofa import sharding
from ofa.tuning.norms import base_parameters

_VALUES = 64
"""Values sampled from each tensor, evenly spaced."""


@torch.no_grad()
def weight_digests(model: nn.Module) -> dict[str, str]:
    """Map each module (a layer, the embedding, the head) to a digest of a sample of its frozen weights, without norms.

    A digest has two halves, one from bfloat16 and one from values rounded to float16 first: copies of one base loaded
    in float32, bfloat16 or float16 agree in at least one half. Modules with trainable, packed (quantized) or offloaded
    weights are skipped; a sharded model gives no digests.
    """
    if sharding.is_sharded(model):
        return {}
    norms = base_parameters(model).keys()
    is_tuned = any(not parameter.requires_grad for parameter in model.parameters())
    groups: dict[str, list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        name = name.replace(".base_layer.", ".")  # as before PEFT wrapped the layer
        if name not in norms and not (is_tuned and parameter.requires_grad):
            groups.setdefault(_group(name), []).append((name, parameter))
    return {
        group: _digest(found)
        for group, found in groups.items()
        if all(tensor.is_floating_point() and not tensor.is_meta for _, tensor in found)
    }


def difference(saved: Mapping[str, str], own: Mapping[str, str]) -> str | None:
    """Name the modules of a model with the digests `own` that differ from the saved ones; None if all agree."""
    half = len(next(iter(saved.values()), "")) // 2
    differing = [
        group
        for group in saved.keys() & own.keys()
        if saved[group][:half] != own[group][:half] and saved[group][half:] != own[group][half:]
    ]
    if not differing:
        return None
    first = next(group for group in own if group in differing)
    return first if len(differing) == 1 else f"{first} and {len(differing) - 1} more of {len(own)} modules"


def _group(name: str) -> str:
    """`model.layers.3` for `model.layers.3.mlp.up_proj.weight`; outside of layers, the parameter's module."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: number + 1])


def _digest(tensors: list[tuple[str, Tensor]]) -> str:
    values = torch.cat([_some(tensor) for _, tensor in tensors]).cpu()
    names = repr([(name, tuple(tensor.shape)) for name, tensor in tensors]).encode()
    return "".join(
        hashlib.sha256(names + values.to(dtype).to(torch.bfloat16).view(torch.int16).numpy().tobytes()).hexdigest()[:16]
        for dtype in (torch.float32, torch.float16)
    )


def _some(tensor: Tensor) -> Tensor:
    """A sample of a tensor's values in float32, on its device, without copying the tensor."""
    places = torch.linspace(0, tensor.numel() - 1, min(_VALUES, tensor.numel()), dtype=torch.float64).long()
    return tensor.detach()[torch.unravel_index(places.to(tensor.device), tensor.shape)].flatten().float()
