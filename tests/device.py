"""The device of the tests' models and batches: a GPU if there is one, to test its kernels."""

from __future__ import annotations

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Random numbers are drawn on the CPU and then moved here, so that they are the same on every device."""
