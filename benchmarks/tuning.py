"""What the tuners share: launches other than the library's own, compiled by several processes before one is timed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from ofa_kernels import launch
from ofa_kernels.ops.launching import launching_by

Launched = tuple[Any, int, tuple[Any, ...], dict[str, Any]]
Job = TypeVar("Job")
Found = TypeVar("Found")


@contextmanager
def deciding(**decisions: Callable[..., Any]) -> Iterator[None]:
    """As long as this context lasts, these stand in the place of the functions of `ofa_kernels.launch`."""
    own = {name: getattr(launch, name) for name in decisions}
    vars(launch).update(decisions)
    try:
        yield
    finally:
        vars(launch).update(own)


def captured(kernel: str, call: Callable[[], Any], architecture: str) -> Launched:
    """The launch of one kernel that a call would make; none of its launches is made.

    Raises:
        LookupError: it makes none of that kernel.
    """
    found: list[Launched] = []

    def keep(function: Any, grid: int, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if function.fn.__name__ == kernel:
            found.append((function, grid, args, keywords))

    with launching_by(keep, architecture):
        call()
    if not found:
        raise LookupError(f"{kernel} is not launched")
    return found[0]


def compile_launch(launched: Launched) -> Any:
    """Leave the binary in Triton's cache, where every process finds it."""
    function, grid, args, keywords = launched
    return function.warmup(*args, grid=(grid,), **keywords)


def in_processes(compile_job: Callable[[Job], Found], jobs: Sequence[Job], processes: int) -> list[Found]:
    """What a function of a module makes of each job, in processes that share nothing with this one."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_job, jobs, chunksize=1))


def reason(failure: Exception) -> str:
    """What a compiler or a driver says, in one line."""
    return f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), '')[:150]}"


def parser(description: str | None, kernels: Sequence[str]) -> argparse.ArgumentParser:
    """The options that all tuners have."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True, help="CSV file to write")
    found.add_argument("--kernels", nargs="+", choices=kernels, default=kernels, help="which kernels")
    found.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile")
    return found
