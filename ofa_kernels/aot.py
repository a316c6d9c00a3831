"""Compiles every kernel for the named GPUs, without needing one, and prints registers, spills and shared memory.

python -m ofa_kernels.aot --arch sm_90 --arch gfx942 [--csv FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ofa_kernels import launch, workload
from ofa_kernels.ops.launching import Kernel, launching_by
from ofa_kernels.resources import Usage, usage

if TYPE_CHECKING:
    from pandas import DataFrame
    from triton.backends.compiler import GPUTarget

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

NO_SPILLS_UP_TO = 8192
"""Widest row, in columns, whose kernels must not spill registers; heads are narrower."""

FEW_SPILLS = 24
"""Bytes per thread (6 registers) that are tolerated: a smaller tile would not spill, but read everything twice."""

AnyCase = workload.Case | workload.CurvatureCase


@dataclass(frozen=True)
class Built:
    """A kernel compiled for one architecture, as one case launches it."""

    kernel: str
    case: str
    width: int
    architecture: str
    num_warps: int
    usage: Usage

    @property
    def complaint(self) -> str | None:
        """The first fault of the compiled kernel; None without one."""
        if self.usage.float64:
            return f"computes in float64 ({self.usage.float64} instructions)"
        if self.usage.spills > FEW_SPILLS and self.width <= NO_SPILLS_UP_TO:
            return f"spills ({self.usage.spills})"
        if not self.usage.wide:
            return "has no 16-byte access"
        if self.usage.shared > launch.SHARED.get(self.architecture, self.usage.shared):
            return f"does not fit: {self.usage.shared} bytes of shared memory"
        return None


class DoesNotCompile(Exception):
    """The compiler refused a kernel; the message says why in one sentence."""


def build(architecture: str, cases: Iterable[AnyCase]) -> Iterator[Built]:
    """Compile every kernel that the cases launch, once each. This process cannot launch Triton kernels afterwards.

    Raises:
        DoesNotCompile: the compiler refused a kernel.
        ValueError: the architecture is not named like sm_90 or gfx942.
        RuntimeError: Triton is set to interpret instead of compile.
    """
    from triton import knobs
    from triton.runtime import driver

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so kernels are interpreted and not compiled; unset it")
    driver.set_active(_NoDevice(_target(architecture)))
    seen: set[str] = set()
    for case in cases:
        for kernel, compiled in _compile(case, architecture):
            if compiled.hash not in seen:
                seen.add(compiled.hash)
                warps = compiled.metadata.num_warps
                yield Built(kernel, case.label, case.width, architecture, warps, usage(compiled))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, write `--csv`; returns 1 if a kernel fails, 2 if the call is wrong."""
    options = _parser().parse_args(arguments)
    cases: list[AnyCase] = [*workload.cases(options.width, options.dtype, options.norm, options.samples)]
    cases += workload.curvature_cases(options.head, options.dtype, options.variant)
    if find_spec("triton") is None:
        print('ofa_kernels.aot: Triton is not installed; pip install "ofa-adapt[cuda]"', file=sys.stderr)
        return 2
    try:
        built = _build_all(options.arch, cases)
    except BrokenProcessPool:
        names = ", ".join(options.arch)
        print(f"ofa_kernels.aot: the compiler crashed; does Triton know all of {names}?", file=sys.stderr)
        return 1
    except (DoesNotCompile, RuntimeError, ValueError) as error:
        print(f"ofa_kernels.aot: {error}", file=sys.stderr)
        return 1 if isinstance(error, DoesNotCompile) else 2
    table = _table(built)
    print(table.to_string(index=False))
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(options.csv, index=False)
    failed = [one for one in built if one.complaint]
    for one in failed:
        print(f"{one.kernel} for {one.architecture} ({one.case}) {one.complaint}", file=sys.stderr)
    return 1 if failed else 0


def _build_all(architectures: Sequence[str], cases: Sequence[AnyCase]) -> list[Built]:
    """Compile each architecture in its own process: Triton has one active driver per process."""
    for architecture in architectures:
        _target(architecture)
    with ProcessPoolExecutor(min(len(architectures), os.cpu_count() or 1)) as pool:
        return [one for built in pool.map(_build_list, architectures, [cases] * len(architectures)) for one in built]


def _build_list(architecture: str, cases: Sequence[AnyCase]) -> list[Built]:
    return list(build(architecture, cases))


def _compile(case: AnyCase, architecture: str) -> list[tuple[str, Any]]:
    compiled = []

    def compile_instead(kernel: Kernel, grid: int, args: tuple[object, ...], keywords: dict[str, object]) -> None:
        name = kernel.fn.__name__
        try:
            compiled.append((name, kernel.warmup(*args, grid=(grid,), **keywords)))
        except Exception as error:
            # Every compiler stage raises different exceptions.
            raise DoesNotCompile(
                f"{name} does not compile for {architecture} ({case.label}): {_reason(error)}"
            ) from None

    with launching_by(compile_instead, architecture):
        case.launch()
    return compiled


def _reason(error: Exception) -> str:
    """The line of a compiler's report with the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = [line for line in lines if "fatal" in line] + [line for line in lines if "error" in line.lower()]
    return next(iter(errors + lines), type(error).__name__)


class _NoDevice:
    """A stand-in for Triton's driver with the methods that compiling needs: it names the target."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> str:
        # Triton caches compiled kernels per device.
        return str(self._target.arch)

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def _target(architecture: str) -> GPUTarget:
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("sm_") and architecture[3:].isdigit():
        return GPUTarget("cuda", int(architecture[3:]), 32)
    if architecture.startswith("gfx9"):
        return GPUTarget("hip", architecture, 64)
    raise ValueError(f"unknown architecture {architecture!r}; name it like {', '.join(ARCHITECTURES)}")


def _table(built: Sequence[Built]) -> DataFrame:
    """A row per compiled kernel."""
    from pandas import DataFrame
    from triton import __version__

    rows = [vars(one) | asdict(one.usage) | {"triton": __version__} for one in built]
    return DataFrame(rows).drop(columns="usage", errors="ignore")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ofa_kernels.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    parser.add_argument("--arch", action="append", required=True, help="sm_80, sm_90, sm_100, gfx942, …; repeatable")
    parser.add_argument("--width", nargs="+", type=int, default=workload.WIDTHS, help="columns of a row")
    parser.add_argument("--dtype", nargs="+", choices=workload.DTYPES, default=["bf16", "fp32"], help="of the stream")
    parser.add_argument("--norm", nargs="+", choices=workload.NORMS, default=[*workload.NORMS], help="which norms")
    parser.add_argument("--samples", nargs="+", type=int, default=workload.SAMPLES, help="perturbed copies N")
    parser.add_argument("--head", nargs="*", type=int, default=workload.HEADS, help="channels of an attention head")
    parser.add_argument(
        "--variant", nargs="+", choices=workload.VARIANTS, default=workload.VARIANTS, help="of attention"
    )
    parser.add_argument("--csv", type=Path, help="file to write the table to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
