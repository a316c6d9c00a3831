"""Ways to measure the trace of a step; all are held to the same limit by the tests.

An estimator is asked twice per branch. `enter` sees the stream and the branch's input and says what to feed instead;
`leave` sees what came out and returns the branch's own output and the trace of every sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ofa.anatomy.steps import Branch, NormView
from ofa.regularizers.objectives import BranchTrace


class ProbedPass(Protocol):
    """A forward pass that is measured: the key of its probes, its padding, and whether it is trained on."""

    seed: int
    with_grad: bool
    mask: Tensor | None


@dataclass(frozen=True)
class Probe:
    """Which random numbers a step of a pass uses: a 64-bit Philox key and the step's counter word."""

    of_pass: ProbedPass
    step: int

    @property
    def seed(self) -> int:
        """The key; read only where numbers are drawn, since `torch.compile` compiles again for every value it reads."""
        return self.of_pass.seed


@dataclass(frozen=True)
class BranchMeasurement:
    """What left a branch: its own output, and what was measured there.

    Attributes:
        output: what the branch computes without probes.
        sqnorm: ‖output‖², (rows), float32, or None where nothing was gained by computing it here.
        trace: tr(J P) per token of every sequence.
    """

    output: Tensor
    sqnorm: Tensor | None
    trace: BranchTrace


class Handle(Protocol):
    """Something attached to a model, until it is removed."""

    def remove(self) -> None:
        """Detach it; a second time does nothing."""
        ...


class TraceEstimator(Protocol):
    """One way to measure tr(J P) of a branch."""

    @property
    def name(self) -> str:
        """The name it is asked for by."""
        ...

    @property
    def held(self) -> bool:
        """Whether the gradient is that in P alone, computed in the forward pass; else traces carry a graph."""
        ...

    @property
    def copies(self) -> int:
        """Branch evaluations that travel in the batch beside the real one."""
        ...

    @property
    def busy(self) -> bool:
        """Whether it is running a branch again by itself: such a run is not measured."""
        ...

    @property
    def relies_on(self) -> Sequence[str]:
        """Paths of modules inside the branches that must be the ones it was made for."""
        ...

    def attach(self) -> Sequence[Handle]:
        """Attach hooks of its own to the model, after those that call `enter` and `leave`."""
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

    def leave(
        self, branch: Branch, norm: NormView, stream: Tensor, leaving: Tensor, probe: Probe, normed: Tensor | None
    ) -> BranchMeasurement:
        """Take apart what left the branch; `normed` is what the norm reads where it does not read the stream."""
        ...
