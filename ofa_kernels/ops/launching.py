"""Defines PyTorch operations and launches their kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from ofa_kernels import launch

library = torch.library.Library("ofa_kernels", "DEF")
"""The library of all operations, `torch.ops.ofa_kernels`."""


R = TypeVar("R")

Arguments = tuple[Any, ...]
"""Tensors, numbers and flags, in the order of an operation's schema."""


Kernel = Any
"""A function that Triton compiles: a `triton.JITFunction`."""


@dataclass(frozen=True)
class Derivative:
    """The gradient of an operation: `setup_context` and `backward` of `torch.library.register_autograd`."""

    save: Callable[[Any, Arguments, Any], None]
    differentiate: Callable[..., tuple[Tensor | None, ...]]


def operation(
    name: str, function: Callable[..., R], fake: Callable[..., R], derivative: Derivative | None = None
) -> Callable[..., R]:
    """Define an operation, differentiable by `derivative` or not at all; returns a function that calls it.

    `function` runs on every device, and its annotations are the schema; `fake` makes the outputs' shapes for tensors
    without data. `torch.compile`, fake tensors and dispatch modes get the registered operation. All other calls bypass
    PyTorch's dispatcher, which takes several times as long as a launch: they go to `function`, or a plain autograd
    function.
    """
    full_name = f"ofa_kernels::{name}"
    library.define(torch.library.infer_schema(function, mutates_args=(), op_name=name))
    torch.library.impl(full_name, "default", _without_aliases(function), lib=library)
    torch.library.register_fake(full_name, fake, lib=library)
    if derivative is None:
        torch.library.register_autograd(full_name, partial(_refuse_derivative, name), lib=library)
    else:
        torch.library.register_autograd(full_name, derivative.differentiate, setup_context=derivative.save, lib=library)
    registered: Callable[..., R] = getattr(torch.ops.ofa_kernels, name).default
    # Without a derivative: the registered operation, whose backward raises.
    tracked: Callable[..., R] = registered if derivative is None else _autograd_function(function, derivative).apply

    def call(*args: object) -> R:
        if torch.compiler.is_compiling() or not is_direct(args):
            return registered(*args)
        return tracked(*args) if torch.is_grad_enabled() and _any_requires_grad(args) else function(*args)

    return call


def _refuse_derivative(name: str, ctx: object, *grads: Tensor | None) -> None:
    """The backward pass of an operation without one; PyTorch would only warn and treat it as a constant."""
    raise RuntimeError(
        f"{name} has no derivative: kernels are differentiable at most once; set OFA_KERNELS=reference in the "
        "environment"
    )


def _without_aliases(function: Callable[..., Any]) -> Callable[..., object]:
    """The function with results that share storage cloned: a registered operation may not return views."""

    def registered(*args: object) -> object:
        results = function(*args)
        if isinstance(results, Tensor):
            return results
        return tuple(one.clone() if one.untyped_storage().nbytes() > one.nbytes else one for one in results)

    return registered


def _autograd_function(function: Callable[..., object], derivative: Derivative) -> type[torch.autograd.Function]:
    class Launched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: object) -> object:
            output = function(*inputs)
            derivative.save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return derivative.differentiate(ctx, *grads)

    return Launched


def is_direct(args: tuple[object, ...]) -> bool:
    """True if the dispatcher can be bypassed: plain tensors, no mode, no transform."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return _PLAIN.issuperset(map(type, args))


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str))


def _any_requires_grad(args: tuple[object, ...]) -> bool:
    return any(arg.requires_grad for arg in args if isinstance(arg, Tensor))


Launcher = Callable[[Kernel, int, tuple[object, ...], dict[str, object]], None]


def run(kernel: Kernel, grid: int, tensor: Tensor, width: int, *args: object, **constants: object) -> None:
    """Launch a row kernel on the device of `tensor`, configured by its dtype and the row's width; not without rows."""
    if grid == 0 or width == 0:
        return
    config = configuration(kernel, tensor, width)
    tiling = {"GROUPS": config.groups, "TILES": config.tiles, "STAGES": config.stages}
    constants |= {name: value for name, value in tiling.items() if name in kernel.arg_names}
    start(kernel, grid, tensor, args, constants, config.max_registers, num_warps=config.num_warps)


def start(
    kernel: Kernel,
    grid: int,
    tensor: Tensor,
    args: tuple[object, ...],
    constants: dict[str, object],
    max_registers: int | None,
    **options: object,
) -> None:
    """Launch a kernel with these arguments, compile-time constants and compiler options."""
    # Fused multiply-adds round once instead of twice; they are off by default in Triton 3.10.
    options["enable_fp_fusion"] = True
    if max_registers is not None:
        options["maxnreg"] = max_registers
    keywords = {**constants, **options}
    if not tensor.is_cuda:
        _launcher(kernel, grid, args, keywords)
        return
    index = tensor.get_device()
    # Triton launches on the current device; switch only if needed, since that takes half as long as a launch.
    if index == torch.cuda.current_device():
        _launcher(kernel, grid, args, keywords)
        return
    with torch.cuda.device(index):
        _launcher(kernel, grid, args, keywords)


def start_by_names(
    kernel: Kernel,
    programs: int,
    tensor: Tensor,
    config: launch.TileLaunch,
    arguments: Mapping[str, object],
    constants: Mapping[str, object],
) -> None:
    """Launch a kernel with the arguments and compile-time constants that its signature names; not without programs."""
    if programs == 0:
        return
    constants = {**constants, "BLOCK_ROWS": config.block_rows, "BLOCK_COLUMNS": config.block_columns}
    names = _names(kernel)
    given = {name: constants[name] for name in names.constants}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    start(kernel, programs, tensor, names.arguments(arguments), given, None, **options)


@dataclass(frozen=True)
class _Names:
    """A kernel's signature: a getter of its arguments, in order, from a mapping, and the names of its constants."""

    arguments: Callable[[Mapping[str, object]], tuple[object, ...]]
    constants: tuple[str, ...]


@cache
def _names(kernel: Kernel) -> _Names:
    annotated = kernel.fn.__annotations__
    constants = tuple(name for name in kernel.arg_names if "constexpr" in str(annotated.get(name)))
    return _Names(itemgetter(*(name for name in kernel.arg_names if name not in constants)), constants)


@contextmanager
def launching_by(launcher: Launcher, architecture: str) -> Iterator[None]:
    """In this context, call `launcher(kernel, grid, args, keywords)` instead of launching.

    Launches are configured for `architecture` instead of the tensors' device.
    """
    global _launcher, _architecture
    before = _launcher, _architecture
    _launcher, _architecture = launcher, architecture
    try:
        yield
    finally:
        _launcher, _architecture = before


def _launch(kernel: Kernel, grid: int, args: tuple[object, ...], keywords: dict[str, object]) -> None:
    kernel[(grid,)](*args, **keywords)


_launcher: Launcher = _launch
_architecture: str | None = None


def configuration(kernel: Kernel, tensor: Tensor, width: int) -> launch.Launch:
    """The launch configuration of a kernel for rows like those of `tensor`."""
    return launch.configure(kernel.fn.__name__, width, tensor.element_size(), target(tensor))


def tiles_of(kernel: Kernel, tensor: Tensor, width: int = 1, *, crowded: bool = False) -> launch.TileLaunch:
    """The launch configuration of a curvature kernel for tensors like this, with heads of `width` channels."""
    return launch.configure_tiles(kernel.fn.__name__, width, tensor.element_size(), target(tensor), crowded)


def target(tensor: Tensor) -> str:
    """The architecture to configure launches for: that of `launching_by`, else the device's."""
    return _architecture or architecture(tensor.device)


@cache
def architecture(device: torch.device) -> str:
    """The compiler's name of a device, such as sm_90 or gfx942; sm_90 without a GPU."""
    if device.type != "cuda":
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a device; 1 without a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class ScaleGradients:
    """Buffers for the gradients of γ and β, summed by each program over its rows, then over the programs in order.

    `weight` and `bias` (None without a shift) are (programs, width) float32 arguments of the kernel; `written` says
    whether it writes them.
    """

    def __init__(self, kernel: Kernel, rows: int, tensor: Tensor, width: int, *, biased: bool, written: bool) -> None:
        config = configuration(kernel, tensor, width)
        self.programs = launch.programs(rows, multiprocessors(tensor.device))
        # A program whose rows are one tile overwrites; with several tiles it adds in memory and needs zeros.
        whole = written and rows > 0 and config.tiles == 1

        def sums() -> Tensor:
            shape = self.programs, width
            fill = torch.empty if whole else torch.zeros
            return fill(shape, dtype=torch.float32, device=tensor.device)

        self.weight, self.bias = sums(), sums() if biased else None

    def total(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of γ and β, with the shape and dtype of `weight`; that of β is empty without a shift."""
        bias = weight.new_empty(0) if self.bias is None else self.bias.sum(0).to(weight.dtype)
        return self.weight.sum(0).to(weight.dtype), bias


def as_rows(tensor: Tensor, width: int) -> Tensor:
    """(…, width) as (rows, width) with dense columns: a view if the strides allow it, else a copy."""
    return dense(tensor).reshape(tensor.shape[:-1].numel(), width)


def as_stack(tensor: Tensor, width: int) -> Tensor:
    """(samples, …, width) as (samples, rows, width) with dense columns: a view or a copy."""
    return dense(tensor).reshape(tensor.shape[0], tensor.shape[1:-1].numel(), width)


def dense(tensor: Tensor) -> Tensor:
    """The tensor, copied unless its last dimension is dense."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def key(seed: int, step: int) -> tuple[int, int, int]:
    """(step, low word, high word of the seed) as signed 32-bit numbers: one type for every value, so one binary."""
    return _signed(step), _signed(seed), _signed(seed >> 32)


def slots(samples: int) -> int:
    """The power of two that holds `samples`, the width of the kernels' tile of values per sample."""
    return 1 << max(samples - 1, 0).bit_length()


def _signed(word: int) -> int:
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
