"""Identify an adapter's base: fingerprints of the base's own scales and shifts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ofa import anatomy
from ofa.tuning.norms import base_parameters


def fingerprints(model: nn.Module) -> dict[str, str]:
    """SHA-256 of the base's own norms in bfloat16, directly and after rounding to float16.

    A base loaded in float32 agrees with its bfloat16 copy in the first, and with its float16 copy in the second. For a
    sharded model, call it on all ranks.
    """
    offsets = {f"{norm.path}.weight": norm.offset for norm in anatomy.tuned_norms(model)}
    return fingerprints_of(base_parameters(model), offsets)


def fingerprints_of(parameters: Mapping[str, Tensor], offsets: Mapping[str, float]) -> dict[str, str]:
    """Fingerprints of scales and shifts by path, in any order; `offsets` are added to the values, as in 1 + w."""
    return {
        "base_fingerprint": _digest(parameters, offsets, torch.float32),
        "base_fingerprint_float16": _digest(parameters, offsets, torch.float16),
    }


def _digest(parameters: Mapping[str, Tensor], offsets: Mapping[str, float], first: torch.dtype) -> str:
    digest = hashlib.sha256()
    for path, value in sorted(parameters.items()):
        # Digest the effective scale: a file that stores 1 + w has lost the last bits of w.
        scale = value.to("cpu", first).float() + offsets.get(path, 0.0)
        digest.update(path.encode())
        digest.update(scale.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
