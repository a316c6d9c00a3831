"""Representative launches of every operation, forward and backward, on meta tensors, by the code that runs on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ofa_kernels.ops import (
    attention_curvature,
    branch_diagonal,
    contract,
    displace,
    mlp_curvature,
    norm_step,
    perturb,
    probed_diagonal,
)

WIDTHS = (1024, 2048, 4096, 6144, 8192, 16384)
"""One width of each launch configuration from 513 to 8192 columns, and 16384.

Other widths share a configuration's binaries if they are divisible by 16.
"""

HEADS = (64, 128)
"""Channels of a head in nearly all models."""

VARIANTS = ("plain", "masked", "normed", "shifted", "capped")
"""Attention as in Llama; with padding; with norms on its heads (Qwen 3); with biases after a LayerNorm (Phi); with
soft-caps, a window, sinks and an additive mask (Gemma 2, gpt-oss)."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NORMS = {"rms": ("rms", 0.0, False), "rms 1+w": ("rms", 1.0, False), "layer+bias": ("layer", 0.0, True)}
SAMPLES = (1, 4)

_ROWS = 256
_PROBE = 0, 0, False
"""Seed, step and Rademacher signs; kernels with Gaussian probes are compiled at their first use."""


@dataclass(frozen=True)
class Case:
    """One setting of the row operations; `launch` calls each of them once, forward and backward."""

    width: int
    dtype: str
    norm: str
    samples: int

    @property
    def label(self) -> str:
        """The case in words."""
        return f"{self.width} {self.dtype} {self.norm} N={self.samples}"

    def launch(self) -> None:
        """Call the operations' registered implementations on meta tensors."""
        kind, offset, biased = NORMS[self.norm]
        norm = 1e-6, kind == "layer", offset
        z = torch.empty(_ROWS, self.width, dtype=DTYPES[self.dtype], device="meta")
        weight = torch.empty(self.width, dtype=torch.float32, device="meta")
        _launch_norm_step(z, weight, norm, biased)
        _launch_probes(z, weight, norm, biased, self.samples)


def cases(widths: Sequence[int], dtypes: Sequence[str], norms: Sequence[str], samples: Sequence[int]) -> list[Case]:
    """All combinations."""
    return [Case(*values) for values in product(widths, dtypes, norms, samples)]


@dataclass(frozen=True)
class CurvatureCase:
    """The curvature of an attention and an MLP of one model, for one sequence and for two."""

    width: int
    """Channels of a head."""
    dtype: str
    variant: str

    @property
    def label(self) -> str:
        """The case in words."""
        return f"heads of {self.width} {self.dtype} {self.variant}"

    def launch(self) -> None:
        """Call the registered implementations on heads that are views of (B, T, H, d), as projections return them."""
        for sequences in (1, 2):
            self._launch_attention(sequences)
            self._launch_mlp(sequences)

    def _launch_attention(self, sequences: int) -> None:
        heads, shared, width, read = 8, 2, 1024, 8
        normed, shifted, capped = (self.variant == name for name in ("normed", "shifted", "capped"))
        q, k = (self._empty(sequences, _ROWS, count, self.width).transpose(1, 2) for count in (heads, shared))
        masks = {
            "masked": torch.empty(sequences, 1, 1, _ROWS, dtype=torch.bool, device="meta"),
            "capped": torch.empty(sequences, 1, _ROWS, _ROWS, device="meta"),
        }
        # Views of half of the model's angles, which repeat.
        angle = self._empty(1, _ROWS, self.width)[..., : self.width // 2]
        gamma = self._empty(self.width)
        moved = q.float() if normed or shifted else None
        moved_key = None if moved is None else k.float()
        seen = _numbers(sequences, heads, _ROWS, read)
        sums = attention_curvature.forward(
            q,
            k,
            k,
            q,
            _numbers(sequences, _ROWS),
            masks.get(self.variant),
            gamma[:heads] if capped else None,
            angle,
            angle,
            q if normed else None,
            gamma if normed else None,
            k if normed else None,
            gamma if normed else None,
            moved,
            moved_key,
            seen,
            seen,
            seen,
            self.width**-0.5,
            True,
            128 if capped else None,
            50.0 if capped else None,
            False,
            1e-6,
            1e-6,
        )[:3]
        weight, other = (self._empty(count, self.width, width) for count in (heads, shared))
        output = self._empty(width, heads * self.width).unflatten(1, (heads, self.width)).transpose(0, 1)
        given = weight, other, other, output
        scale = _numbers(width) if shifted else None
        branch_diagonal.forward_trace(*given, *sums, _numbers(width), scale)
        if sequences == 1:
            first = sums[0][0], sums[1][0], sums[2][0]
            branch_diagonal.forward_diagonal(*given, *first, scale)

    def _launch_mlp(self, sequences: int) -> None:
        width, inner, shifted = 1024, 4096, self.variant == "shifted"
        gate = self._empty(sequences, _ROWS, inner)
        up, activation = (None, "gelu_tanh") if shifted else (gate, "silu")
        shift = _numbers(inner) if shifted else None
        weights, read = _numbers(sequences, _ROWS), self._empty(sequences, 8, inner)
        p_g, p_u, _ = mlp_curvature.forward(gate, up, weights, read, shift, None, activation)
        weight = self._empty(inner, width)
        other, p_u = (None, None) if shifted else (weight, p_u)  # type: ignore[assignment]
        down, scale = self._empty(width, inner), _numbers(width) if shifted else None
        branch_diagonal.forward_mlp(weight, other, down, p_g, p_u, scale)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=DTYPES[self.dtype], device="meta")


def curvature_cases(heads: Sequence[int], dtypes: Sequence[str], variants: Sequence[str]) -> list[CurvatureCase]:
    """All combinations."""
    return [CurvatureCase(*values) for values in product(heads, dtypes, variants)]


def _launch_norm_step(z: Tensor, weight: Tensor, norm: tuple[float, bool, float], biased: bool) -> None:
    row = _row(z)
    for update in (z, None):
        norm_step.forward(z, update, weight, weight if biased else None, *norm, measured=True)
    # All gradients; those of a norm without an update; those without one of the length.
    for stream, normalized, sqnorm in ((z, z, row), (None, z, None), (z, z, None)):
        norm_step.backward(z, z, weight, row, row, stream, normalized, sqnorm, None, norm[1], norm[2], biased)


def _launch_probes(z: Tensor, weight: Tensor, norm: tuple[float, bool, float], biased: bool, samples: int) -> None:
    stack, products = z.new_empty(samples, *z.shape), _row(z).expand(samples, _ROWS)
    for front, scaled in ((z, True), (None, False)):
        perturb.forward(z, front, weight, weight if biased else None, *norm, scaled, samples, 0.1, *_PROBE)
    perturb.backward(z, weight, stack, *norm, 0.1, *_PROBE, biased)
    # 1/σ, and γ/σ.
    for diagonal in (_row(z).unsqueeze(-1).expand(z.shape), z.float()):
        displace.forward(z, diagonal, samples, 0.1, *_PROBE)
    displace.backward(stack, 0.1, *_PROBE, True)
    contract.forward(z, stack, *_PROBE)
    probed_diagonal.forward(z[None], stack.unsqueeze(1), _row(z)[None], *_PROBE)
    contract.backward(z, products, _row(z), samples, *_PROBE)
    # `squared_norm` is a contraction without copies.
    contract.forward(z, stack[:0], *_PROBE)
    contract.backward(z, None, _row(z), 0, *_PROBE)


def _row(z: Tensor) -> Tensor:
    return torch.empty(_ROWS, dtype=torch.float32, device=z.device)


def _numbers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="meta")
