"""The fewest bytes that each operation must move through device memory, as a function of its sizes.

The model: every element of every input row is read once and every element of every output row is written once, in
the stream's dtype; numbers per row, `displace`'s preconditioner and its gradient are float32; γ and β are read once
and their gradients written once for all rows together. All gradients are given and computed.

Left out, because it comes from a cache or is small relative to the rows:

- γ and β, which every row reads again;
- a tile that `perturb` reads again for every probe, and the second read of its gradients;
- a row of several tiles, read a second time after its moments;
- the sums of their gradients that each program of a backward pass writes, and the sum over the programs.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32 = 4
"""Bytes of a number per row, and of an element of the preconditioner."""


@dataclass(frozen=True)
class Size:
    """The sizes of one call: `itemsize` is the stream's, `scale_itemsize` that of γ and β, both in bytes."""

    rows: int
    width: int
    itemsize: int
    samples: int = 0
    biased: bool = False
    centred: bool = False
    scale_itemsize: int = FLOAT32

    @property
    def stream(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.width * self.itemsize

    @property
    def preconditioner(self) -> int:
        """Bytes of one diagonal per row."""
        return self.rows * self.width * FLOAT32

    @property
    def scalars(self) -> int:
        """Bytes of one number per row."""
        return self.rows * FLOAT32

    @property
    def scale(self) -> int:
        """Bytes of γ, or of its gradient."""
        return self.width * self.scale_itemsize

    @property
    def scale_and_shift(self) -> int:
        """Bytes of γ and β (if any), or of their gradients."""
        return self.scale * (1 + self.biased)


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written."""

    reads: int
    writes: int

    @property
    def total(self) -> int:
        """Bytes moved."""
        return self.reads + self.writes


def norm_step_forward(size: Size) -> Traffic:
    """residual, update → stream, normalized; ‖update‖², 1/σ, and for LayerNorm μ."""
    return Traffic(
        reads=2 * size.stream + size.scale_and_shift,
        writes=2 * size.stream + (2 + size.centred) * size.scalars,
    )


def norm_step_backward(size: Size) -> Traffic:
    """stream, update, and gradients of stream, normalized and ‖update‖² → gradients of residual, update, γ, β."""
    return Traffic(
        reads=4 * size.stream + (2 + size.centred) * size.scalars + size.scale,
        writes=2 * size.stream + size.scale_and_shift,
    )


def add_norm_backward(size: Size) -> Traffic:
    """As `norm_step_backward` without ‖update‖²: residual and update have one gradient."""
    return Traffic(
        reads=3 * size.stream + (1 + size.centred) * size.scalars + size.scale,
        writes=size.stream + size.scale_and_shift,
    )


def perturb_forward(size: Size, *, unperturbed: bool = False) -> Traffic:
    """Stream → copies, after a copy of `unperturbed` if given."""
    return Traffic(
        reads=(1 + unperturbed) * size.stream + size.scale_and_shift,
        writes=(unperturbed + size.samples) * size.stream,
    )


def perturb_backward(size: Size) -> Traffic:
    """Stream and gradients of the copies → gradients of stream, γ, β; that of `unperturbed` is already there."""
    return Traffic(
        reads=(1 + size.samples) * size.stream + size.scale,
        writes=size.stream + size.scale_and_shift,
    )


def contract_forward(size: Size) -> Traffic:
    """base, copies → products, ‖base‖²."""
    return Traffic(reads=(1 + size.samples) * size.stream, writes=(1 + size.samples) * size.scalars)


def contract_backward(size: Size) -> Traffic:
    """Base and the gradients of products and ‖base‖² → gradients of base and copies."""
    return Traffic(
        reads=size.stream + (1 + size.samples) * size.scalars,
        writes=(1 + size.samples) * size.stream,
    )


def probed_diagonal(size: Size, sequences: int) -> Traffic:
    """base, copies, weights → a diagonal per sequence."""
    return Traffic(reads=(1 + size.samples) * size.stream + size.scalars, writes=sequences * size.width * FLOAT32)


def displace_forward(size: Size, per_row: bool = False) -> Traffic:
    """stream, preconditioner (`per_row`: one number per row, as 1/σ is) → copies."""
    diagonal = size.scalars if per_row else size.preconditioner
    return Traffic(reads=size.stream + diagonal, writes=size.samples * size.stream)


def displace_backward(size: Size) -> Traffic:
    """Gradients of the copies → gradients of stream and preconditioner."""
    return Traffic(reads=size.samples * size.stream, writes=size.stream + size.preconditioner)
