"""The launches that stand for all others: every operation, forward and backward, on tensors without data.

Whatever these launch is what the run time launches for such tensors, because it is the same code that launches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ofa_kernels.launch import widest_head
from ofa_kernels.ops import (
    attention_moments,
    attention_trace,
    constants,
    contract,
    displace,
    mlp_trace,
    norm_step,
    norm_trace,
    perturb,
    step_boundary,
)

WIDTHS = (1024, 2048, 4096, 6144, 8192, 16384)
"""One width of each launch configuration from 513 to 8192 columns, and 16384.

Every other width of a configuration shares its binaries if 16 divides it.
"""

HEADS = (32, 64, 128, 256)
"""Channels of a head, one for each launch configuration of the attention kernels and the most usual of the smallest."""

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
        _launch_mlp_trace(z, weight, biased)
        _launch_norm_trace(z, weight, norm, biased)
        _launch_mlp_constants(z, weight, centred=norm[1])


def cases(widths: Sequence[int], dtypes: Sequence[str], norms: Sequence[str], samples: Sequence[int]) -> list[Case]:
    """All combinations."""
    return [Case(*values) for values in product(widths, dtypes, norms, samples)]


@dataclass(frozen=True)
class AttentionCase:
    """Causal attention with rotated heads, forward and backward: all keys, or those that a mask leaves."""

    width: int
    dtype: str
    masked: str
    """"" for nothing, "padded" for a mask of keys, "pairwise" for one of every query and key, to be added."""
    tangent: bool = False
    """Whether queries move in a direction of their own, as where projections have biases: shifts, to a trace."""

    @property
    def label(self) -> str:
        """The case in words."""
        words = f"heads of {self.width}", self.dtype, self.masked, "tangent" if self.tangent else ""
        return " ".join(filter(None, words))

    def launch(self) -> None:
        """Call the registered implementation on heads that are views of (B, T, H, d), as projections leave them."""
        sequences, rows, heads = 2, _ROWS, 8

        def per_head(count: int) -> Tensor:
            shape = sequences, rows, count, self.width
            return torch.empty(shape, dtype=DTYPES[self.dtype], device="meta").transpose(1, 2)

        q, k = per_head(heads), per_head(heads // 4)
        angle = torch.empty(1, rows, self.width, device="meta")
        number = torch.empty(sequences, heads, rows, device="meta")
        masks = {
            "padded": torch.empty(sequences, 1, 1, rows, dtype=torch.bool, device="meta"),
            "pairwise": torch.empty(sequences, 1, rows, rows, device="meta"),
        }
        mask = masks.get(self.masked)
        given = q, k, k, q, angle, q, q, q if self.tangent else None, mask
        settings = self.width**-0.5, True, None
        attention_moments.forward(*given, *settings)
        attention_moments.backward(*given, number, number, number, q, *settings)
        if q.element_size() == 2 and self.width <= attention_trace.WIDEST_HEAD:
            shift = torch.empty(heads, self.width, device="meta") if self.tangent else None
            self._launch_trace(q, k, number, shift, mask)

    def _launch_trace(self, q: Tensor, k: Tensor, number: Tensor, shift: Tensor | None, mask: Tensor | None) -> None:
        heads, rows = q.shape[1:3]
        constant = torch.empty(heads, self.width, self.width, device="meta")
        # Views of the model's, which has every angle twice.
        angle = torch.empty(1, rows, self.width, dtype=q.dtype, device="meta")[..., : self.width // 2]
        features = torch.empty(q.shape, dtype=q.dtype, device="meta")
        of_keys = None if shift is None else shift[: k.shape[1]]
        shifts = shift, of_keys, of_keys
        given = q, k, k, q, constant, constant, number[0, :, 0], *shifts, mask, angle, angle
        settings = False, self.width**-0.5, True, None
        attention_trace.forward(*given, *settings)
        saved = features, features, features[:1, 0], number
        attention_trace.backward(*given, *saved, q, number[:, 0], *settings)


def attention_cases(heads: Sequence[int], dtypes: Sequence[str]) -> list[AttentionCase]:
    """All combinations that the kernels take; with a tangent those that do not spill: 16 bits, up to 128 channels."""
    found = []
    for width, dtype in product(heads, dtypes):
        size = DTYPES[dtype].itemsize
        if width <= widest_head(size):
            found += [AttentionCase(width, dtype, masked) for masked in ("", "padded", "pairwise")]
        if width <= 128 and size == 2:
            found.append(AttentionCase(width, dtype, "padded", tangent=True))
    return found


@dataclass(frozen=True)
class WeightsCase:
    """The constants of an attention's weights, each stored as a matrix of its own, forward and backward."""

    width: int
    dtype: str
    centred: bool

    @property
    def label(self) -> str:
        """The case in words."""
        return f"weights of heads of {self.width} {self.dtype} {'layer' if self.centred else 'rms'}"

    def launch(self) -> None:
        """Call what the operations' registered implementations are; heads share keys, and stand beside each other."""
        heads, shared, width = 8, 2, 1024

        def weight(count: int) -> Tensor:
            return torch.empty(count, self.width, width, dtype=DTYPES[self.dtype], device="meta")

        output = torch.empty(width, heads * self.width, dtype=DTYPES[self.dtype], device="meta")
        output = output.unflatten(1, (heads, self.width)).transpose(0, 1)
        scale = torch.empty(width, device="meta")
        given = weight(heads), weight(shared), weight(shared), output, scale
        grads = constants.forward_attention(*given, self.centred)
        constants.backward_attention(*given, *grads, self.centred)


def weights_cases(heads: Sequence[int], dtypes: Sequence[str], norms: Sequence[str]) -> list[WeightsCase]:
    """All combinations that differ to the kernels, which know of a norm only whether it centres."""
    centred = dict.fromkeys(NORMS[norm][0] == "layer" for norm in norms)
    return [WeightsCase(*values) for values in product(heads, dtypes, centred)]


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
    for passed in (None, z):
        contract.backward(z, None, _row(z), 0, *_PROBE, passed)


def _launch_step_boundary(
    z: Tensor, weight: Tensor, norm: tuple[float, bool, float], biased: bool, samples: int
) -> None:
    stack, products = _stack(z, samples), _row(z).expand(samples, _ROWS)
    step_boundary.forward(z, z, stack, weight, weight if biased else None, *norm, samples, 0.1, *_PROBE)
    grads = z, _stack(z, 1 + samples), _row(z), products
    step_boundary.backward(z, z, weight, *grads, samples, *norm, 0.1, *_PROBE, biased)


def _launch_mlp_trace(z: Tensor, weight: Tensor, biased: bool) -> None:
    """A gated and a plain MLP of this width, whose pre-activations have shifts if the norm in front of them has one."""
    for up, activation in ((z, "silu"), (None, "gelu")):
        gated = up is not None
        traces = weight, weight if gated else None
        shifts = weight if biased else None, weight if biased and gated else None
        for hidden in (None, z):
            mlp_trace.forward(z, up, *traces, *shifts, hidden, activation)
        mlp_trace.backward(z, up, *traces, *shifts, _stack(z, 2), _row(z), activation)


def _launch_norm_trace(z: Tensor, weight: Tensor, norm: tuple[float, bool, float], biased: bool) -> None:
    """The product that made the image has a shift if the norm in front of the branch has one."""
    given = z, weight, z, _row(z), weight if biased else None
    _, saved = norm_trace.forward(*given, *norm)
    norm_trace.backward(*given, saved, _row(z), norm[1], norm[2])


def _launch_mlp_constants(z: Tensor, weight: Tensor, *, centred: bool) -> None:
    """A gated and a plain MLP behind a norm of this width, whose weights are stored row by row."""
    inner = 4 * z.shape[1]
    gate, down = z.new_empty(inner, z.shape[1]), z.new_empty(z.shape[1], inner)
    for up in (gate, None):
        grads = constants.forward_mlp(gate, up, down, weight, centred)
        constants.backward_mlp(gate, up, down, weight, grads[0], None if up is None else grads[1], centred)


def _row(z: Tensor) -> Tensor:
    return torch.empty(_ROWS, dtype=torch.float32, device=z.device)


def _stack(z: Tensor, samples: int) -> Tensor:
    return torch.empty(samples, *z.shape, dtype=z.dtype, device=z.device)
