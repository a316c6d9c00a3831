"""Between tensors and kernels: rows, seeds, and the one function through which every kernel is launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ofa_kernels import binaries, launch

library = torch.library.Library("ofa_kernels", "DEF")
"""Where all operations are defined: `torch.ops.ofa_kernels`."""


def implement(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Give an operation its launches on every device, and its shapes where there is no data."""
    torch.library.impl(f"ofa_kernels::{name}", "default", function, lib=library)
    torch.library.register_fake(f"ofa_kernels::{name}", fake, lib=library)


def differentiable_once(name: str) -> None:
    """Make the second derivative of a backward operation an error; PyTorch would only warn and go on without it."""

    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(
            f"{name} has no derivative, as kernels are differentiable once or not at all; set OFA_KERNELS=reference in "
            "the environment"
        )

    torch.library.register_autograd(f"ofa_kernels::{name}", refuse, lib=library)


@dataclass(frozen=True)
class Derivative:
    """The gradient of an operation: what its forward pass keeps, and what its backward pass makes of that.

    `save(ctx, inputs, output)` and `differentiate(ctx, *grads)` are those of `torch.library.register_autograd`.
    """

    save: Callable[[Any, tuple[Any, ...], Any], None]
    differentiate: Callable[..., Any]


def operation(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], derivative: Derivative | None = None
) -> Callable[..., Any]:
    """Implement a defined operation, differentiable by `derivative` or not at all; returns what calls it.

    The registered operation is there for whoever looks at operations: `torch.compile`, tensors without data, dispatch
    modes. Going through PyTorch's dispatcher and back into Python for each of its keys takes several times as long as
    a launch, so that any other call goes to `function` at once, by way of a plain autograd function if need be.
    """
    implement(name, _of_their_own(function), fake)
    if derivative is None:
        differentiable_once(name)
    else:
        torch.library.register_autograd(
            f"ofa_kernels::{name}", derivative.differentiate, setup_context=derivative.save, lib=library
        )
    registered = getattr(torch.ops.ofa_kernels, name).default
    # Without a derivative: the registered one, which refuses to be differentiated.
    tracked = registered if derivative is None else _autograd_function(function, derivative).apply

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not is_direct(args):
            return registered(*args)
        return tracked(*args) if torch.is_grad_enabled() and _any_requires_grad(args) else function(*args)

    return call


def _of_their_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with copies of results that are parts of one tensor: those of a registered operation may not be."""

    def registered(*args: Any) -> Any:
        results = function(*args)
        if isinstance(results, Tensor):
            return results
        return tuple(one.clone() if one.untyped_storage().nbytes() > one.nbytes else one for one in results)

    return registered


def _autograd_function(function: Callable[..., Any], derivative: Derivative) -> type[torch.autograd.Function]:
    class Launched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            derivative.save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return derivative.differentiate(ctx, *grads)

    return Launched


def is_direct(args: tuple[Any, ...]) -> bool:
    """Whether nobody but autograd looks at operations on these arguments: plain tensors, no mode, no transform."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return _PLAIN.issuperset(map(type, args))


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str))


def _any_requires_grad(args: tuple[Any, ...]) -> bool:
    return any(arg.requires_grad for arg in args if isinstance(arg, Tensor))


Launcher = Callable[[Any, int, tuple[Any, ...], dict[str, Any]], None]


def run(kernel: Any, grid: int, tensor: Tensor, width: int, *args: Any, **constants: Any) -> None:
    """Launch a kernel on the device of `tensor`, whose dtype and the row's width decide how. No rows, no launch."""
    if grid == 0 or width == 0:
        return
    config = configuration(kernel, tensor, width)
    names = kernel.arg_names
    if "GROUPS" in names:
        constants["GROUPS"] = config.groups
    if "TILES" in names:
        constants["TILES"] = config.tiles
    if "STAGES" in names:
        constants["STAGES"] = config.stages
    start(kernel, grid, tensor, args, constants, config.max_registers, num_warps=config.num_warps)


def start(
    kernel: Any,
    grid: int,
    tensor: Tensor,
    args: tuple[Any, ...],
    constants: dict[str, Any],
    max_registers: int | None,
    **options: Any,
) -> None:
    """Launch a kernel with everything decided: its arguments, its compile-time constants, the compiler's options."""
    # Fused multiply-adds round once instead of twice; Triton 3.10 turns them off unless asked.
    options["enable_fp_fusion"] = True
    if max_registers is not None:
        options["maxnreg"] = max_registers
    keywords = {**constants, **options}
    if not tensor.is_cuda:
        _launcher(kernel, grid, args, keywords)
        return
    binaries.offer(architecture(tensor.device))
    index = tensor.get_device()
    # Triton launches on the current device. Changing it takes as long as half a launch, and is hardly ever needed.
    if index == torch.cuda.current_device():
        _launcher(kernel, grid, args, keywords)
        return
    with torch.cuda.device(index):
        _launcher(kernel, grid, args, keywords)


def start_by_names(
    kernel: Any,
    programs: int,
    tensor: Tensor,
    config: launch.TileLaunch,
    arguments: dict[str, Any],
    constants: dict[str, Any],
) -> None:
    """Launch a kernel with those of the arguments and compile-time constants that it names. No programs, no launch."""
    if programs == 0:
        return
    constants = constants | {"BLOCK_ROWS": config.block_rows, "BLOCK_COLUMNS": config.block_columns}
    names = _names(kernel)
    given = {name: constants[name] for name in names.constants}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    start(kernel, programs, tensor, names.arguments(arguments), given, None, **options)


@dataclass(frozen=True)
class _Names:
    """What a kernel names: its arguments, taken in order from a mapping, and its compile-time constants."""

    arguments: Callable[[dict[str, Any]], tuple[Any, ...]]
    constants: tuple[str, ...]


@cache
def _names(kernel: Any) -> _Names:
    annotated = kernel.fn.__annotations__
    constants = tuple(name for name in kernel.arg_names if "constexpr" in str(annotated.get(name)))
    return _Names(itemgetter(*(name for name in kernel.arg_names if name not in constants)), constants)


@contextmanager
def launching_by(launcher: Launcher, architecture: str) -> Iterator[None]:
    """As long as this context lasts, hand every launch to `launcher(kernel, grid, args, keywords)` instead.

    Launches are configured for `architecture`, whatever the tensors' device is.
    """
    global _launcher, _architecture
    before = _launcher, _architecture
    _launcher, _architecture = launcher, architecture
    try:
        yield
    finally:
        _launcher, _architecture = before


def _launch(kernel: Any, grid: int, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    kernel[(grid,)](*args, **keywords)


_launcher: Launcher = _launch
_architecture: str | None = None


def configuration(kernel: Any, tensor: Tensor, width: int) -> launch.Launch:
    """The launch configuration of a kernel for rows like those of `tensor`."""
    return launch.configure(kernel.fn.__name__, width, tensor.element_size(), target(tensor))


def tiles_of(kernel: Any, tensor: Tensor, width: int = 1, *, crowded: bool = False) -> launch.TileLaunch:
    """The launch configuration of a kernel of the curvature for tensors like this, with heads of `width` channels."""
    return launch.configure_tiles(kernel.fn.__name__, width, tensor.element_size(), target(tensor), crowded)


def target(tensor: Tensor) -> str:
    """What launches for a tensor are configured for: its device's architecture, or that of `launching_by`."""
    return _architecture or architecture(tensor.device)


@cache
def architecture(device: torch.device) -> str:
    """What the device is to a compiler, such as sm_90 or gfx942; sm_90 where there is none."""
    if device.type != "cuda":
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has; one where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def runs_and_tiles(kernel: Any, rows: int, tensor: Tensor, width: int) -> tuple[int, int]:
    """Of a kernel whose programs take one tile of a run of rows each: how many runs there are, and tiles of a row.

    The tiles of a row are work for as many programs, so that fewer runs of rows keep a GPU busy.
    """
    tiles = configuration(kernel, tensor, width).tiles
    return (launch.programs(rows, max(1, multiprocessors(tensor.device) // tiles)) if rows else 0), tiles


class ScaleGradients:
    """Sums of the gradients of γ and β over the rows of each program, and over the programs in their order.

    `weight` and `bias` (None unless there is a shift) are (programs, width) float32 and go to the kernel; `written`
    says whether it writes them at all.
    """

    def __init__(self, kernel: Any, rows: int, tensor: Tensor, width: int, *, biased: bool, written: bool) -> None:
        config = configuration(kernel, tensor, width)
        self.programs = launch.programs(rows, multiprocessors(tensor.device))
        # A program whose rows are one tile writes its sum in the end; the others add to what is there.
        whole = written and rows > 0 and config.tiles == 1

        def sums() -> Tensor:
            shape = self.programs, width
            fill = torch.empty if whole else torch.zeros
            return fill(shape, dtype=torch.float32, device=tensor.device)

        self.weight, self.bias = sums(), sums() if biased else None

    def total(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of γ and β, shaped and typed like `weight`; that of β is empty without a shift."""
        bias = weight.new_empty(0) if self.bias is None else self.bias.sum(0).to(weight.dtype)
        return self.weight.sum(0).to(weight.dtype), bias


def as_rows(tensor: Tensor, width: int) -> Tensor:
    """(…, width) as (rows, width) with dense columns: a view where the strides allow it, a copy elsewhere."""
    return _dense_columns(tensor, width).reshape(tensor.shape[:-1].numel(), width)


def as_stack(tensor: Tensor, width: int) -> Tensor:
    """(samples, …, width) as (samples, rows, width) with dense columns, likewise."""
    return _dense_columns(tensor, width).reshape(tensor.shape[0], tensor.shape[1:-1].numel(), width)


def _dense_columns(tensor: Tensor, width: int) -> Tensor:
    return tensor if width <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def key(seed: int, step: int) -> tuple[int, int, int]:
    """(step, low word, high word of the seed) as signed 32-bit numbers, so that every value has the same type."""
    return _signed(step), _signed(seed), _signed(seed >> 32)


def slots(samples: int) -> int:
    """The power of two that holds as many samples: what the kernels keep of each is a tile like any other."""
    return 1 << max(samples - 1, 0).bit_length()


def _signed(word: int) -> int:
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
