"""Ways to measure the trace h_t of a step; all are held to the same limit by the tests.

An estimator is asked twice per branch. `enter` sees the stream and the branch's input and says what to feed instead;
`leave` sees what came out and returns the branch's own output and the trace contribution of every row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ofa.anatomy import Branch, NormView


class Seeded(Protocol):
    """A forward pass that has probes of its own."""

    seed: int


@dataclass(frozen=True)
class Probe:
    """Which random numbers a step of a pass uses: a 64-bit Philox key and the step's counter word."""

    of_pass: Seeded
    step: int

    @property
    def seed(self) -> int:
        """The key; read only by who draws, since `torch.compile` compiles anew for every value that is read."""
        return self.of_pass.seed


@dataclass(frozen=True)
class Leaving:
    """What left a branch: its own output, and what was measured there, row by row.

    The trace of a row's own block is tr(J_i P_i) = factor · Σ products over the probes. It is left to whoever collects
    them to add up the products of all steps at once, since each small sum is a launch of its own on a GPU.

    Attributes:
        output: what the branch computes without probes.
        sqnorm: ‖output‖², (rows), float32, or None where nothing was gained by computing it here.
        products: one value per probe and row, (probes, rows), float32.
        factor: what their sum is multiplied by.
    """

    output: Tensor
    sqnorm: Tensor | None
    products: Tensor
    factor: float


class Handle(Protocol):
    """Something attached to a model, until it is removed."""

    def remove(self) -> None:
        """Detach it; a second time does nothing."""
        ...


class TraceEstimator(Protocol):
    """One way to measure tr(J P) of a branch, row by row."""

    @property
    def name(self) -> str:
        """The name it is asked for by."""
        ...

    @property
    def copies(self) -> int:
        """Branch evaluations that travel in the batch beside the real one."""
        ...

    @property
    def relies_on(self) -> Sequence[str]:
        """Paths of modules inside the branches that must be the ones it was made for."""
        ...

    def attach(self) -> Sequence[Handle]:
        """Attach hooks of its own to the model, behind those that call `enter` and `leave`."""
        ...

    def begin(self, branches: Collection[Branch]) -> None:
        """A forward pass of the model begins in which these branches are measured."""
        ...

    def abandon(self) -> None:
        """A branch that was entered may never be left, because an exception ended it: let go of everything."""
        ...

    def enter(self, branch: Branch, norm: NormView, stream: Tensor, entering: Tensor, probe: Probe) -> Tensor:
        """What to feed the branch instead of `entering`, with 1 + `copies` times its leading dimension."""
        ...

    def leave(self, branch: Branch, norm: NormView, stream: Tensor, leaving: Tensor, probe: Probe) -> Leaving:
        """Take apart what left the branch, before any norm that stands behind it."""
        ...
