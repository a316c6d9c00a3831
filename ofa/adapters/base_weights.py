"""Which weights an adapter was made for, beside the norms it replaces: a few values of every tensor, by layer.

A fine-tuned model often has the very norms of its base. Reading everything would cost more than loading it, so that a
change counts that reaches one of the values that are read, which any training of a layer does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ofa import sharding
from ofa.tuning.norms import base_parameters

_VALUES = 64
"""Read of each tensor, evenly spread."""


@torch.no_grad()
def weight_digests(model: nn.Module) -> dict[str, str]:
    """Module path (a layer, the embedding, the head) → digest of some of its frozen weights, norms excepted.

    Two halves, of the values rounded to bfloat16 and to float16 first: models of one base, loaded in any two of float32
    and these, agree in one of them. Weights that train are not the base's. Left out are modules with packed (quantized)
    or offloaded weights; of a sharded model, all.
    """
    if sharding.is_sharded(model):
        return {}
    norms = base_parameters(model).keys()
    is_tuned = any(not parameter.requires_grad for parameter in model.parameters())
    groups: dict[str, list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if name not in norms and not (is_tuned and parameter.requires_grad):
            groups.setdefault(_group(name), []).append((name, parameter))
    return {
        group: _digest(found)
        for group, found in groups.items()
        if all(tensor.is_floating_point() and not tensor.is_meta for _, tensor in found)
    }


def difference(saved: Mapping[str, str], model: nn.Module) -> str | None:
    """Where the weights of a model are not those that the digests are of, in a few words; None where they are."""
    own = weight_digests(model)
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
    """`model.layers.3` of `model.layers.3.mlp.up_proj.weight`, and the module elsewhere."""
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
    """Values of a tensor without a copy of it, in float32, on its device."""
    places = torch.linspace(0, tensor.numel() - 1, min(_VALUES, tensor.numel()), dtype=torch.float64).long()
    return tensor.detach()[torch.unravel_index(places.to(tensor.device), tensor.shape)].flatten().float()
