"""The operations in which kernels are compared, their tensors, and all implementations.

Norms are RMS without a shift, with a float32 scale. "eager" is the reference, "compile" the reference compiled, and
"library" PyTorch's own fused functions. Liger and QuACK do not compute ‖update‖², so they are compared in `add_norm`,
the norm step without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import traffic
from benchmarks.traffic import Size, Traffic
from ofa_kernels import reference
from ofa_kernels.ops import contract, norm_step, perturb, probed_diagonal

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensors]
Call = Callable[[], Tensors]

VARIANTS = ("eager", "library", "compile", "triton", "liger", "quack")

_EPS, _EPSILON = 1e-6, 0.1
_SEED, _STEP, _GAUSSIAN = 7, 3, False


@dataclass(frozen=True)
class Case:
    """The tensors of one comparison: rows, width, dtype and device."""

    rows: int
    width: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Implementation:
    """A function of tensors, and how its gradients are computed if it is not by autograd."""

    function: Function
    backward: Callable[[Tensors, Tensors], Call] | None = None

    def prepare(self, inputs: Tensors, gradients: Tensors = ()) -> Call:
        """The forward pass; with gradients, the backward pass alone, as often as it is called."""
        if not gradients:
            return partial(self.function, *inputs)
        return (self.backward or self._differentiate)(inputs, gradients)

    def _differentiate(self, inputs: Tensors, gradients: Tensors) -> Call:
        leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
        return partial(torch.autograd.grad, self.function(*leaves), leaves, gradients, retain_graph=True)


@dataclass(frozen=True)
class Operation:
    """A function of tensors, its incoming gradients, the traffic of its passes, and its implementations."""

    name: str
    inputs: Callable[[Case], Tensors]
    gradients: Callable[[Case], Tensors]
    forward: Callable[[Size], Traffic]
    backward: Callable[[Size], Traffic] | None
    """None if the kernels have no gradient."""
    eager: Function
    triton: Implementation
    library: Function | None = None
    others: dict[str, Implementation] = field(default_factory=dict)
    samples: int = 0
    weights: tuple[int, ...] = ()
    """Inputs, by index, that weight the rows of a sum."""

    def implementations(self, device: torch.device) -> dict[str, Implementation]:
        """All implementations on a device, "eager" first; kernels and compilers only on GPUs."""
        found = {"eager": Implementation(self.eager)}
        if self.library is not None:
            found["library"] = Implementation(self.library)
        if device.type == "cuda":
            found |= {"compile": Implementation(_compiled(self.eager)), "triton": self.triton, **self.others}
        return found


@dataclass(frozen=True)
class Pass:
    """One direction of an operation."""

    operation: Operation
    direction: str

    @property
    def name(self) -> str:
        """The name in the table, where the number of samples is a separate column."""
        return f"{self.operation.name}_{self.direction}"

    @property
    def label(self) -> str:
        """Name and number of samples."""
        return f"{self.name} N={self.operation.samples}" if self.operation.samples else self.name

    def draw(self, case: Case) -> tuple[Tensors, Tensors]:
        """Random inputs, and random gradients for a backward pass."""
        return self.operation.inputs(case), self.operation.gradients(case) if self.direction == "backward" else ()

    def traffic(self, case: Case) -> Traffic:
        """The bytes that must be moved."""
        model = self.operation.forward if self.direction == "forward" else self.operation.backward
        assert model is not None
        return model(Size(case.rows, case.width, case.dtype.itemsize, self.operation.samples))


def passes(samples: Sequence[int]) -> list[Pass]:
    """Both directions of all operations, and for those with probes, each number of samples."""
    probed = [make(n) for make in (_contract, _perturb, _perturb_unscaled, _probed_diagonal) for n in samples]
    chosen = _norm_step(), _add_norm(), *probed
    return [Pass(one, way) for one in chosen for way in ("forward", "backward") if way == "forward" or one.backward]


def _norm_step() -> Operation:
    def call(function: Callable[..., Any]) -> Function:
        return lambda residual, update, weight: function(residual, update, weight, eps=_EPS)[:3]

    def library(residual: Tensor, update: Tensor, weight: Tensor) -> Tensors:
        length = torch.linalg.vector_norm(update, dim=-1, dtype=torch.float32)
        return *_library_add_norm(residual, update, weight), length.square()

    return Operation(
        "norm_step",
        inputs=lambda case: (_rows(case), _rows(case), _scale(case)),
        gradients=lambda case: (_rows(case), _rows(case), _scalars(case)),
        forward=traffic.norm_step_forward,
        backward=traffic.norm_step_backward,
        eager=call(reference.norm_step),
        triton=Implementation(call(norm_step.norm_step), _norm_step_backward),
        library=library,
    )


def _add_norm() -> Operation:
    def eager(residual: Tensor, update: Tensor, weight: Tensor) -> Tensors:
        return reference.norm_step(residual + update, None, weight, eps=_EPS)[:2]

    def triton(residual: Tensor, update: Tensor, weight: Tensor) -> Tensors:
        return norm_step.norm_step(residual, update, weight, eps=_EPS)[:2]

    return Operation(
        "add_norm",
        inputs=lambda case: (_rows(case), _rows(case), _scale(case)),
        gradients=lambda case: (_rows(case), _rows(case)),
        # Only our kernel writes the length, four bytes per row.
        forward=traffic.norm_step_forward,
        backward=traffic.add_norm_backward,
        eager=eager,
        triton=Implementation(triton, _add_norm_backward),
        library=_library_add_norm,
        others=_other_add_norms(),
    )


def _contract(samples: int) -> Operation:
    def call(function: Callable[..., Any]) -> Function:
        return lambda base, copies: function(base, copies, seed=_SEED, step=_STEP)

    return Operation(
        "contract",
        inputs=lambda case: (_rows(case), _rows(case, samples)),
        gradients=lambda case: (_scalars(case, samples), _scalars(case)),
        forward=traffic.contract_forward,
        backward=traffic.contract_backward,
        eager=call(reference.contract),
        triton=Implementation(call(contract.contract), _contract_backward),
        samples=samples,
    )


def _perturb(samples: int) -> Operation:
    settings = {"eps": _EPS, "samples": samples, "epsilon": _EPSILON, "seed": _SEED, "step": _STEP}

    def call(function: Callable[..., Any]) -> Function:
        return lambda stream, front, weight: (function(stream, weight, unperturbed=front, **settings),)

    return Operation(
        "perturb",
        inputs=lambda case: (_rows(case), _rows(case), _scale(case)),
        gradients=lambda case: (_rows(case, 1 + samples),),
        forward=partial(traffic.perturb_forward, unperturbed=True),
        backward=traffic.perturb_backward,
        eager=call(reference.perturb),
        triton=Implementation(call(perturb.perturb), _perturb_backward),
        samples=samples,
    )


def _perturb_unscaled(samples: int) -> Operation:
    """What `hutchinson` does with the gradient in P alone: N copies along ν/σ, and `_probed_diagonal`."""
    settings = {"eps": _EPS, "samples": samples, "epsilon": _EPSILON, "seed": _SEED, "step": _STEP, "scaled": False}

    def call(function: Callable[..., Tensor]) -> Function:
        return lambda stream, weight: (function(stream, weight, **settings),)

    return Operation(
        "perturb_unscaled",
        inputs=lambda case: (_rows(case), _scale(case)),
        gradients=lambda case: (),
        forward=traffic.perturb_forward,
        backward=None,
        eager=call(reference.perturb),
        triton=Implementation(call(perturb.perturb)),
        samples=samples,
    )


def _probed_diagonal(samples: int) -> Operation:
    """All rows are tokens of one sequence."""

    def call(function: Callable[..., Tensor]) -> Function:
        return lambda base, copies, weights: (function(base, copies, weights, seed=_SEED, step=_STEP),)

    return Operation(
        "probed_diagonal",
        inputs=lambda case: (_rows(case, 1), _rows(case, samples, 1), _scalars(case, 1)),
        gradients=lambda case: (),
        forward=partial(traffic.probed_diagonal, sequences=1),
        backward=None,
        eager=call(reference.probed_diagonal),
        triton=Implementation(call(probed_diagonal.probed_diagonal)),
        samples=samples,
        weights=(2,),
    )


def _rows(case: Case, *stacked: int) -> Tensor:
    return torch.randn(*stacked, case.rows, case.width, dtype=case.dtype, device=case.device)


def _scalars(case: Case, *stacked: int) -> Tensor:
    return torch.randn(*stacked, case.rows, device=case.device)


def _scale(case: Case) -> Tensor:
    return 0.5 + torch.rand(case.width, device=case.device)


def _compiled(function: Function) -> Function:
    from torch._functorch import config

    # A compiled backward graph that donates its buffers can run only once.
    config.donated_buffer = False
    return torch.compile(function, dynamic=False)


def _library_add_norm(residual: Tensor, update: Tensor, weight: Tensor) -> Tensors:
    stream = residual + update
    # The fused kernel needs one dtype.
    return stream, F.rms_norm(stream, weight.shape, weight.to(stream.dtype), _EPS)


def _other_add_norms() -> dict[str, Implementation]:
    """Implementations of other projects, if installed; neither is a dependency."""
    found = {"liger": ("liger_kernel", _liger_add_norm), "quack": ("quack", _quack_add_norm)}
    return {name: Implementation(function) for name, (package, function) in found.items() if find_spec(package)}


def _liger_add_norm(residual: Tensor, update: Tensor, weight: Tensor) -> Tensors:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    offset, casting, in_place = 0.0, "llama", False
    normalized, stream = LigerFusedAddRMSNormFunction.apply(update, residual, weight, _EPS, offset, casting, in_place)
    return stream, normalized


def _quack_add_norm(residual: Tensor, update: Tensor, weight: Tensor) -> Tensors:
    from quack import rmsnorm

    normalized, stream = rmsnorm(update, weight, residual=residual, eps=_EPS, prenorm=True)
    return stream, normalized


def _norm_step_backward(inputs: Tensors, gradients: Tensors) -> Call:
    saved = _saved_by_norm_step(inputs)
    return lambda: torch.ops.ofa_kernels.norm_step_backward(*saved, *gradients, None, False, 0.0, False)[:3]


def _add_norm_backward(inputs: Tensors, gradients: Tensors) -> Call:
    saved = _saved_by_norm_step(inputs)

    def call() -> Tensors:
        backward = torch.ops.ofa_kernels.norm_step_backward
        both, _, grad_weight, _ = backward(*saved, *gradients, None, None, False, 0.0, False)
        return both, both, grad_weight

    return call


def _saved_by_norm_step(inputs: Tensors) -> Tensors:
    residual, update, weight = inputs
    settings = _EPS, False, 0.0, True
    stream, _, _, rstd, mean = torch.ops.ofa_kernels.norm_step(residual, update, weight, None, *settings)
    return stream, update, weight, rstd, mean


def _contract_backward(inputs: Tensors, gradients: Tensors) -> Call:
    base, copies = inputs
    arguments = base, *gradients, len(copies), _SEED, _STEP, _GAUSSIAN
    return lambda: torch.ops.ofa_kernels.contract_backward(*arguments)


def _perturb_backward(inputs: Tensors, gradients: Tensors) -> Call:
    stream, _, weight = inputs
    front, copies = gradients[0][0], gradients[0][1:]

    def call() -> Tensors:
        settings = _EPS, False, 0.0, _EPSILON, _SEED, _STEP, _GAUSSIAN, False
        grad_stream, grad_weight, _ = torch.ops.ofa_kernels.perturb_backward(stream, weight, copies, *settings)
        return grad_stream, front, grad_weight

    return call
