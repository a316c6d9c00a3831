"""Arithmetic in float32, whatever autocast the caller is in."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context without autocast on the tensor's device: products of widened tensors stay wide."""
    return torch.autocast(tensor.device.type, enabled=False)
