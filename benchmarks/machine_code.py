"""Counts the instructions and barriers of the row kernels, without a GPU.

python -m benchmarks.machine_code --out benchmarks/results/machine_code.csv

Rows of 4096 bfloat16 numbers, RMSNorm, N = 4. A kernel's loops are those over its samples, which run N times. If
a program takes one row after the other they are inside that loop, and instructions outside it count for no row.
Of the variants of a kernel (with or without a residual, and the like) the longest is in the table.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.table import commit, significant, triton_version, writing
from ofa_kernels import aot, workload
from ofa_kernels.resources import cuobjdump

WIDTH, SAMPLES = 4096, 4
OVER_ROWS = ("norm_step_backward", "perturb_backward", "probed_diagonal_rows")
"""Kernels whose programs loop over rows; programs of the others have one row."""
KERNELS = (
    *("norm_step_forward", "perturb_forward", "contract_forward", "contract_backward"),
    *OVER_ROWS,
)

Loop = tuple[int, int]
"""Addresses of the first and the last instruction."""


@dataclass(frozen=True)
class Row:
    """One number of one kernel; `per_row` metrics are those of a row, instructions for each of its warps."""

    benchmark: str
    kernel: str
    architecture: str
    width: int
    samples: int
    metric: str
    value: float
    unit: str
    triton: str
    commit: str


@dataclass(frozen=True)
class Code:
    """The instructions of a kernel by address."""

    instructions: dict[int, str]

    @property
    def loops(self) -> list[Loop]:
        """The ranges of its backward branches, each once."""
        found = ((re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text), address) for address, text in self.instructions.items())
        ends = [(int(match[1], 16), address) for match, address in found if match]
        return [(first, last) for first, last in ends if first < last]

    def count(self, wanted: Callable[[str], bool], within: Loop | None = None) -> int:
        """Number of instructions of a kind, in all or in a loop."""
        first, last = within or (min(self.instructions), max(self.instructions))
        return sum(first <= address <= last and wanted(text) for address, text in self.instructions.items())

    def per_row(self, wanted: Callable[[str], bool], samples: int, *, over_rows: bool) -> int:
        """Number of a kind per row; `over_rows`: the longest loop is over rows."""
        loops = self.loops
        rows = max(loops, key=lambda loop: loop[1] - loop[0]) if over_rows and loops else None
        inner = [one for one in loops if rows is None or (one != rows and rows[0] <= one[0] and one[1] <= rows[1])]
        return self.count(wanted, rows) + sum((samples - 1) * self.count(wanted, one) for one in inner)


def read(listing: str) -> Code:
    """The instructions of a listing."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing)
    return Code({int(address, 16): text for address, text in found})


def is_any(text: str) -> bool:
    """Every instruction."""
    return True


def is_barrier(text: str) -> bool:
    """An instruction at which the threads of a program sync."""
    return "BAR.SYNC" in text


def rows(architecture: str) -> Iterator[Row]:
    """The numbers of every kernel."""
    longest: dict[str, tuple[Code, aot.Built]] = {}
    for built in aot.build(architecture, workload.cases((WIDTH,), ("bf16",), ("rms",), (SAMPLES,))):
        if built.kernel in KERNELS:
            cubin = next(data for name, data in built.entry.files if name.endswith(".cubin"))
            code = read(cuobjdump(cubin, "-sass"))
            if built.kernel not in longest or code.count(is_any) > longest[built.kernel][0].count(is_any):
                longest[built.kernel] = code, built
    origin = triton_version(), commit()
    for kernel in KERNELS:
        code, built = longest[kernel]
        over_rows = kernel in OVER_ROWS
        numbers = {
            "instructions": code.count(is_any),
            "instructions_per_row": code.per_row(is_any, SAMPLES, over_rows=over_rows),
            "barriers": code.count(is_barrier),
            "barriers_per_row": code.per_row(is_barrier, SAMPLES, over_rows=over_rows),
            "registers": built.usage.registers,
            "shared": built.usage.shared,
        }
        print(f"{kernel:24}", *(f"{name} {value:5}" for name, value in numbers.items()), flush=True)
        for metric, value in numbers.items():
            unit = "B" if metric == "shared" else "1"
            size = WIDTH, SAMPLES
            yield Row("machine_code", kernel, architecture, *size, metric, significant(value), unit, *origin)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, count and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--arch", default="sm_90", help="sm_80, sm_90, sm_100: those that NVIDIA's disassembler reads")
    options = parser.parse_args(arguments)
    with writing(options.out, Row) as write:
        write(rows(options.arch))


if __name__ == "__main__":
    main()
