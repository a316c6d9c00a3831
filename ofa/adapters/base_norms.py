"""Which norms an adapter was made for: fingerprints of the base's own scales and shifts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ofa import anatomy
from ofa.tuning.norms import base_parameters


def fingerprints(model: nn.Module) -> dict[str, str]:
    """SHA-256 of the base's own norms in bfloat16; two models of one base agree in at least one of them.

    The second is of the values rounded to float16 first. A base loaded in float32 agrees with itself loaded in
    bfloat16 in the first, and with itself loaded in float16 in the second. Of a sharded model: call it on all ranks.
    """
    offsets = {f"{norm.path}.weight": norm.offset for norm in anatomy.tuned_norms(model)}
    return fingerprints_of(base_parameters(model), offsets)


def fingerprints_of(parameters: Mapping[str, Tensor], offsets: Mapping[str, float]) -> dict[str, str]:
    """The same of scales and shifts by path, where a path in `offsets` adds that to its values, as 1 + w does.

    The order of the paths does not matter.
    """
    return {
        "base_fingerprint": _digest(parameters, offsets, torch.float32),
        "base_fingerprint_float16": _digest(parameters, offsets, torch.float16),
    }


def _digest(parameters: Mapping[str, Tensor], offsets: Mapping[str, float], first: torch.dtype) -> str:
    digest = hashlib.sha256()
    for path, value in sorted(parameters.items()):
        # What the norm multiplies by: where that is 1 + w, a file that holds the sum has lost the last bits of w.
        scale = value.to("cpu", first).float() + offsets.get(path, 0.0)
        digest.update(path.encode())
        digest.update(scale.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
