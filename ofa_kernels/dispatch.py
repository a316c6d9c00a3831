"""The one place that decides which implementation of an operation runs.

The choice is made per call and from the tensors alone, so that one process may use several devices. An implementation
is offered with `register`; the reference accepts everything and is asked last. `OFA_KERNELS=reference` in the
environment leaves only the reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ofa_kernels import reference

OPERATIONS = ("norm_step", "squared_norm", "perturb", "displace", "contract", "rstd")


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation; `accepts` looks at its first tensor and imports nothing heavy."""

    name: str
    function: Callable[..., Any]
    accepts: Callable[[Tensor], bool]


def register(operation: str, implementation: Implementation) -> None:
    """Offer an implementation, asked before those registered earlier.

    Raises:
        KeyError: there is no such operation.
    """
    _IMPLEMENTATIONS[operation].insert(0, implementation)


def choose(operation: str, tensor: Tensor) -> Implementation:
    """The implementation of `operation` that runs for a tensor of this device, dtype and shape."""
    offered = _IMPLEMENTATIONS[operation]
    if os.environ.get("OFA_KERNELS") == "reference":
        return offered[-1]
    return next(implementation for implementation in offered if implementation.accepts(tensor))


def norm_step(residual: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual addition, norm and squared update per row; see `reference.norm_step`."""
    return choose("norm_step", residual).function(residual, *args, **kwargs)


def squared_norm(update: Tensor) -> Tensor:
    """Squared length of each row; see `reference.squared_norm`."""
    return choose("squared_norm", update).function(update)


def perturb(stream: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Normalized copies moved along preconditioned probes; see `reference.perturb`."""
    return choose("perturb", stream).function(stream, *args, **kwargs)


def displace(stream: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Copies moved along preconditioned probes; see `reference.displace`."""
    return choose("displace", stream).function(stream, *args, **kwargs)


def contract(base: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Probes against what they changed, per row; see `reference.contract`."""
    return choose("contract", base).function(base, *args, **kwargs)


def rstd(stream: Tensor, **kwargs: Any) -> Tensor:
    """1/σ of each row; see `reference.rstd`."""
    return choose("rstd", stream).function(stream, **kwargs)


_IMPLEMENTATIONS = {
    operation: [Implementation("reference", getattr(reference, operation), lambda tensor: True)]
    for operation in OPERATIONS
}
