"""The launches that stand for all others: every operation, forward and backward, on tensors without data.

Whatever these launch is what the run time launches for such tensors, because it is the same code that launches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ofa_kernels.ops import contract, displace, norm_step, perturb, step_boundary

WIDTHS = (1024, 2048, 4096, 6144, 8192, 16384)
"""One width of each launch configuration from 513 to 8192 columns, and 16384.

Every other width of a configuration shares its binaries if 16 divides it.
"""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NORMS = {"rms": ("rms", 0.0, False), "rms 1+w": ("rms", 1.0, False), "layer+bias": ("layer", 0.0, True)}
SAMPLES = (1, 4)

_ROWS = 256
_PROBE = 0, 0, False
"""Seed, step, and Rademacher signs; Gaussian probes are compiled when they are first used."""


@dataclass(frozen=True)
class Case:
    """One way to call the operations; `launch` goes through each of them once, forward and backward."""

    width: int
    dtype: str
    norm: str
    samples: int

    @property
    def label(self) -> str:
        """The case in words."""
        return f"{self.width} {self.dtype} {self.norm} N={self.samples}"

    def launch(self) -> None:
        """Call what the operations' registered implementations are, on tensors of the meta device."""
        kind, offset, biased = NORMS[self.norm]
        norm = 1e-6, kind == "layer", offset
        z = torch.empty(_ROWS, self.width, dtype=DTYPES[self.dtype], device="meta")
        weight = torch.empty(self.width, dtype=torch.float32, device="meta")
        _launch_norm_step(z, weight, norm, biased)
        _launch_probes(z, weight, norm, biased, self.samples)
        _launch_step_boundary(z, weight, norm, biased, self.samples)


def cases(widths: Sequence[int], dtypes: Sequence[str], norms: Sequence[str], samples: Sequence[int]) -> list[Case]:
    """All combinations."""
    return [Case(*values) for values in product(widths, dtypes, norms, samples)]


def _launch_norm_step(z: Tensor, weight: Tensor, norm: tuple[float, bool, float], biased: bool) -> None:
    row = _row(z)
    for update in (z, None):
        norm_step.forward(z, update, weight, weight if biased else None, *norm)
    # All gradients; those of a norm without an update; those of a step whose length nobody uses.
    for stream, normalized, sqnorm in ((z, z, row), (None, z, None), (z, z, None)):
        norm_step.backward(z, z, weight, row, row, stream, normalized, sqnorm, None, norm[1], norm[2], biased)


def _launch_probes(z: Tensor, weight: Tensor, norm: tuple[float, bool, float], biased: bool, samples: int) -> None:
    stack, products = _stack(z, samples), _row(z).expand(samples, _ROWS)
    perturb.forward(z, z, weight, weight if biased else None, *norm, samples, 0.1, *_PROBE)
    perturb.backward(z, weight, stack, *norm, 0.1, *_PROBE, biased)
    displace.forward(z, z, samples, 0.1, *_PROBE)
    displace.backward(stack, 0.1, *_PROBE, True)
    contract.forward(z, stack, *_PROBE)
    contract.backward(z, products, _row(z), samples, *_PROBE)
    # A squared norm alone is a contraction with no copies.
    contract.forward(z, stack[:0], *_PROBE)
    contract.backward(z, None, _row(z), 0, *_PROBE)


def _launch_step_boundary(
    z: Tensor, weight: Tensor, norm: tuple[float, bool, float], biased: bool, samples: int
) -> None:
    stack, products = _stack(z, samples), _row(z).expand(samples, _ROWS)
    step_boundary.forward(z, z, stack, weight, weight if biased else None, *norm, samples, 0.1, *_PROBE)
    grads = z, _stack(z, 1 + samples), _row(z), products
    step_boundary.backward(z, z, weight, *grads, samples, *norm, 0.1, *_PROBE, biased)


def _row(z: Tensor) -> Tensor:
    return torch.empty(_ROWS, dtype=torch.float32, device=z.device)


def _stack(z: Tensor, samples: int) -> Tensor:
    return torch.empty(samples, *z.shape, dtype=z.dtype, device=z.device)
