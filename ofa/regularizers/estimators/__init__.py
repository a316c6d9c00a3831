"""The interface of the trace estimators.

An estimator is called twice per branch. `enter` gets the stream and the branch's input and returns the input to use
instead; `leave` gets the output and returns the branch's own output and the trace of every sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ofa.anatomy.steps import Branch, NormView
from ofa.regularizers.measured_pass import MeasuredPass
from ofa.regularizers.objectives import BranchTrace


@dataclass(frozen=True)
class Probe:
    """The random numbers of a step: its pass's 64-bit Philox key, and the step's counter word."""

    of_pass: MeasuredPass
    step: int

    @property
    def seed(self) -> int:
        """The key. A property, since `torch.compile` would compile again for every value that it reads."""
        return self.of_pass.seed


@dataclass(frozen=True)
class BranchMeasurement:
    """A branch's own output, and the measurements of the branch.

    Attributes:
        output: the branch's output without probes.
        sqnorm: ‖output‖², (rows), float32, if the estimator's kernel computes it anyway; else None.
        trace: tr(J P) per token of every sequence.
    """

    output: Tensor
    sqnorm: Tensor | None
    trace: BranchTrace


class Handle(Protocol):
    """Something attached to a model that can be removed."""

    def remove(self) -> None:
        """Detach it; a second call does nothing."""
        ...


class TraceEstimator(ABC):
    """One way to measure tr(J P) of a branch."""

    name: str
    """The name that the option `estimator` has for it."""
    held: bool = True
    """Whether the gradient is in P alone and computed in the forward pass; else traces have a graph."""
    copies: int = 0
    """Number of copies of the branch's input in the batch, besides the real one."""
    busy: bool = False
    """Whether the estimator is itself running a branch; such a run is not measured."""
    relies_on: Sequence[str] = ()
    """Paths of modules inside the branches that must not be replaced after attaching."""

    def attach(self, model: nn.Module, branches: Sequence[Branch]) -> Sequence[Handle]:
        """Attach the estimator's own hooks to these branches, after those that call `enter` and `leave`."""
        return ()

    def abandon(self) -> None:  # noqa: B027 - not every estimator has state
        """Release all state: after an exception a branch that was entered may never be left."""

    @abstractmethod
    def enter(self, branch: Branch, norm: NormView, stream: Tensor, entering: Tensor, probe: Probe) -> Tensor:
        """The input to use instead of `entering`, with 1 + `copies` times its leading dimension."""

    @abstractmethod
    def leave(
        self, branch: Branch, norm: NormView, stream: Tensor, leaving: Tensor, probe: Probe, normed: Tensor | None
    ) -> BranchMeasurement:
        """The branch's own output and measurements; `normed` is the norm's input if that is not the stream."""
