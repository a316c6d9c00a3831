"""Where tests put their models and batches: on a GPU if there is one, so that its kernels are what is tested."""

from __future__ import annotations

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Numbers are drawn on the CPU and then brought here, so that they are the same on every device."""
