"""Times each row kernel with other launch settings, to tune the thresholds of `launch.configure`.

python -m benchmarks.tune_rows --out benchmarks/results/tune_rows_gpu.csv [--kernels norm_step_backward …]

A candidate is a tile, its warps, its registers, the number of tiles that a loop has in flight and, if programs share
the rows with a partial sum each, their number per multiprocessor. The whole operation is timed: the kernel and the sum
of those partial sums. Every launch is compiled in one of several processes first; one that does not fit, or whose
results are wrong, is named and not timed; spills are in the table. Without a GPU small sizes are interpreted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product

import torch

from benchmarks import timing, tuning
from benchmarks.implementations import Case, Pass, passes
from benchmarks.kernels import TOLERANCE, relative_error
from benchmarks.table import commit, device_name, significant, triton_version, writing
from ofa_kernels import launch
from ofa_kernels.launch import Launch
from ofa_kernels.ops import launching
from ofa_kernels.resources import usage

SAMPLES = 4
DTYPE = torch.bfloat16
OPERATIONS = ("norm_step", "perturb", "contract")
KERNELS = tuple(f"{operation}_{way}" for operation in OPERATIONS for way in ("forward", "backward"))
ROWS = {"cuda": (8192, 512), "cpu": (3,)}
WIDTH = {"cuda": 4096, "cpu": 256}
REPEATS = {"cuda": 20, "cpu": 2}

THREADS = ((4, 128), (4, 255), (8, 64), (8, 128), (8, 255), (16, 64), (16, 128))
"""Warps, and registers per thread: 8 to 32 of 4096 columns per thread, one to four programs per multiprocessor."""
STAGED = ("norm_step_backward", "perturb_backward")
STAGES = (1, 3)
"""Not 2: by its disassembly, norm_step_backward then waits for a row as long as with 1; see `Launch.stages`."""
PROGRAMS = (1, 2, 4)


@dataclass(frozen=True)
class Candidate:
    """A launch, and the programs per multiprocessor that share the rows; None for the library's own."""

    launch: Launch
    programs: int | None = None

    def decides(self, kernel: str) -> AbstractContextManager[None]:
        """Launch `kernel` with these settings in this context."""
        configure, programs = launch.configure, launch.programs

        def share(rows: int, multiprocessors: int) -> int:
            if self.programs is None:
                return programs(rows, multiprocessors)
            return max(1, min(rows, self.programs * multiprocessors))

        return tuning.deciding(
            configure=lambda name, *args: self.launch if name == kernel else configure(name, *args), programs=share
        )


@dataclass(frozen=True)
class Job:
    """One candidate of one kernel at one size, picklable for another process."""

    kernel: str
    rows: int
    width: int
    device: str
    candidate: Candidate
    chosen: bool

    @property
    def label(self) -> str:
        """The job in one line."""
        used, programs = self.candidate.launch, self.candidate.programs
        sizes = f"{32 * used.groups} columns {used.num_warps} warps {used.max_registers} registers {used.stages} stages"
        return f"{self.kernel} {self.rows}x{self.width} {sizes} {programs or 'own'} programs"

    @property
    def case(self) -> Case:
        """The tensors."""
        return Case(self.rows, self.width, DTYPE, torch.device(self.device))


@dataclass(frozen=True)
class Compiled:
    """The result of compiling: the error, or the bytes per thread that the binary spills."""

    problem: str | None = None
    spills: int = 0


@dataclass(frozen=True)
class Row:
    """One number of the table; `programs` is 0 and `chosen` is 1 for the library's own."""

    benchmark: str
    kernel: str
    rows: int
    width: int
    samples: int
    columns: int
    num_warps: int
    max_registers: int
    stages: int
    programs: int
    chosen: int
    metric: str
    value: float
    unit: str
    device: str
    torch: str
    triton: str
    commit: str


def candidates(kernel: str, width: int) -> list[Candidate]:
    """Candidates besides the library's own launch."""
    block = max(128, 1 << (width - 1).bit_length())
    launches = [
        Launch(block // 32, 1, warps, registers, stages)
        for (warps, registers), stages in product(THREADS, STAGES if kernel in STAGED else (1,))
    ]
    return [Candidate(*both) for both in product(launches, PROGRAMS if kernel in STAGED else (None,))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile and time all launches of all kernels, and write the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = tuning.parser(__doc__, KERNELS)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS[device.type], help="rows of a tensor")
    parser.add_argument("--width", type=int, default=WIDTH[device.type], help="columns of a row")
    parser.add_argument("--repeats", type=int, default=REPEATS[device.type], help="timed calls of each launch")
    options = parser.parse_args(arguments)
    jobs = [
        job
        for kernel, rows in product(options.kernels, options.rows)
        for job in _jobs(kernel, rows, options.width, device)
    ]
    # A binary does not depend on the number of rows and programs.
    binaries = list(dict.fromkeys(map(_binary, jobs)))
    found = [Compiled()] * len(binaries)
    if device.type == "cuda":
        found = tuning.in_processes(_compile, binaries, options.processes)
    compiled = dict(zip(binaries, found, strict=True))
    with writing(options.out, Row) as write:
        for job in jobs:
            write(_measured(job, compiled[_binary(job)], options.repeats))


def _jobs(kernel: str, rows: int, width: int, device: torch.device) -> list[Job]:
    own = Candidate(launch.configure(kernel, width, DTYPE.itemsize, launching.architecture(device)))
    return [
        Job(kernel, rows, width, str(device), candidate, chosen=candidate == own)
        for candidate in dict.fromkeys((own, *candidates(kernel, width)))
    ]


def _binary(job: Job) -> tuple[str, int, str, Launch]:
    return job.kernel, job.width, job.device, job.candidate.launch


def _compile(binary: tuple[str, int, str, Launch]) -> Compiled:
    """Compile into Triton's cache."""
    kernel, width, name, used = binary
    device, one = torch.device(name), _pass(kernel)

    def call() -> None:
        one.operation.triton.prepare(*one.draw(Case(64, width, DTYPE, device)))()

    try:
        with Candidate(used).decides(kernel):
            compiled = tuning.compile_launch(tuning.captured(kernel, call, launching.architecture(device)))
        return Compiled(spills=usage(compiled).spills)
    except Exception as failure:
        return Compiled(tuning.reason(failure))


def _pass(kernel: str) -> Pass:
    return next(one for one in passes((SAMPLES,)) if one.name == kernel)


def _measured(job: Job, compiled: Compiled, repeats: int) -> Iterator[Row]:
    if compiled.problem is not None:
        print(f"{job.label}: {compiled.problem}", file=sys.stderr)
        return
    one, case = _pass(job.kernel), job.case
    if compiled.spills:
        yield _row(job, one, "spills", compiled.spills, "byte")
    with job.candidate.decides(job.kernel):
        try:
            error = relative_error(one, one.operation.triton, case)
            if not error <= TOLERANCE[DTYPE]:
                print(f"{job.label} refused: error {error:.2g}", file=sys.stderr)
                yield _row(job, one, "error", error, "1")
                return
            sets = timing.sets_beyond_cache(one.traffic(case).total, case.device)
            calls = [one.operation.triton.prepare(*one.draw(case)) for _ in range(sets)]
            times = timing.measure(calls, case.device, repeats)
        except Exception as failure:
            print(f"{job.label}: {tuning.reason(failure)}", file=sys.stderr)
            return
    print(f"{job.label} {times.median:8.4f} ms", "*" * job.chosen)
    yield _row(job, one, "time_median", times.median, "ms")


def _row(job: Job, one: Pass, metric: str, value: float, unit: str) -> Row:
    used = job.candidate.launch
    size = job.rows, job.width, one.operation.samples
    tile = 32 * used.groups, used.num_warps, used.max_registers or 0, used.stages, job.candidate.programs or 0
    origin = device_name(torch.device(job.device)), torch.__version__, triton_version(), commit()
    return Row("tune_rows", job.kernel, *size, *tile, int(job.chosen), metric, significant(value), unit, *origin)


if __name__ == "__main__":
    main()
