"""Times every operation's kernels, forward and backward, and other implementations of the same, as one long table.

python -m benchmarks.kernels --out benchmarks/results/kernels_h200.csv

GB/s count the bytes of `benchmarks.traffic`, the minimum that must move, and are compared with a copy of a large tensor
in the same run. Without a GPU only the reference is timed, at small sizes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.implementations import VARIANTS, Case, Implementation, Pass, passes
from benchmarks.table import commit, device_name, significant, triton_version, writing

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = {"cuda": (576, 1024, 2048, 4096, 8192, 16384, 32768), "cpu": (576, 1024)}
ROWS = {"cuda": (512, 2048, 8192, 32768), "cpu": (64,)}
SAMPLES = (1, 4)
REPEATS = {"cuda": 50, "cpu": 5}

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
"""Largest error against float64 of a timed implementation: ‖out − ref‖ / ‖ref‖."""
CHECKED_ROWS = 4


@dataclass(frozen=True)
class Row:
    """One number of the table; `error` says why an implementation was refused, `time_ratio` is to eager."""

    benchmark: str
    variant: str
    rows: int
    width: int
    samples: int
    dtype: str
    metric: str
    value: float
    unit: str
    device: str
    torch: str
    triton: str
    commit: str


@dataclass(frozen=True)
class Run:
    """Facts of all measurements in a table; `copied` is the copy bandwidth in bytes per second."""

    variants: Sequence[str]
    repeats: int
    copied: float


Maker = Callable[[str, str, float, str], Row]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all operations at all sizes, and write the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = _parser(device).parse_args(arguments)
    with writing(options.out, Row) as write:
        run = Run(options.variants, options.repeats, timing.copy_bandwidth(device, options.repeats))
        write([_copy_row(device, run)])
        chosen = [one for one in passes(options.samples) if one.name in options.operations]
        for one, rows, width, dtype in product(chosen, options.rows, options.widths, options.dtypes):
            write(_measure(one, Case(rows, width, DTYPES[dtype], device), run))


def relative_error(one: Pass, implementation: Implementation, case: Case) -> float:
    """The largest ‖out − ref‖ / ‖ref‖ of all results, by the reference in float64 on the first rows of the case.

    The other rows get no gradients and no weights, so that sums over rows are those of the first.
    """
    few = one.draw(replace(case, rows=min(case.rows, CHECKED_ROWS)))
    wide = (tuple(tensor.double() for tensor in tensors) for tensors in few)
    expected = Implementation(one.operation.eager).prepare(*wide)()
    inputs, gradients = one.draw(case)
    for tensor in (*gradients, *(inputs[index] for index in one.operation.weights)):
        tensor.zero_()
    for part, whole in zip((*few[0], *few[1]), (*inputs, *gradients), strict=True):
        whole[_corner(part)] = part
    actual = implementation.prepare(inputs, gradients)()
    gaps = [_gap(out[_corner(ref)], ref) for out, ref in zip(actual, expected, strict=True)]
    # Python's max would lose a NaN.
    return float(torch.stack(gaps).max())


def _measure(one: Pass, case: Case, run: Run) -> Iterator[Row]:
    row, label = _row_maker(one, case), f"{one.label} {case.rows}x{case.width} {case.dtype}"
    moved = one.traffic(case).total
    if moved > timing.free_memory(case.device) / 2:
        print(f"{label} skipped: takes {moved / 2**30:.1f} GiB", file=sys.stderr)
        return
    # The compiler stops compiling a function after many sizes.
    torch.compiler.reset()
    eager = None
    for name, implementation in one.operation.implementations(case.device).items():
        if name not in run.variants:
            continue
        try:
            error = relative_error(one, implementation, case)
            if not error <= TOLERANCE[case.dtype]:
                print(f"{label} {name} refused: error {error:.2g}", file=sys.stderr)
                yield row(name, "error", error, "1")
                continue
            times = _times(one, implementation, case, run.repeats)
        except Exception as failure:
            # One implementation may run out of memory or not support the device; the others go on.
            print(f"{label} {name} failed: {failure!r}"[:500], file=sys.stderr)
            continue
        eager = times.median if name == "eager" else eager
        yield from _time_rows(row, name, times, moved, run.copied, eager)


def _times(one: Pass, implementation: Implementation, case: Case, repeats: int) -> timing.Times:
    sets = timing.sets_beyond_cache(one.traffic(case).total, case.device)
    calls = [implementation.prepare(*one.draw(case)) for _ in range(sets)]
    return timing.measure(calls, case.device, repeats)


def _time_rows(
    row: Maker, name: str, times: timing.Times, moved: int, copied: float, eager: float | None
) -> Iterator[Row]:
    bandwidth = moved / (1e-3 * times.median)
    yield row(name, "time_median", times.median, "ms")
    yield row(name, "time_p20", times.p20, "ms")
    yield row(name, "time_p80", times.p80, "ms")
    yield row(name, "bandwidth", 1e-9 * bandwidth, "GB/s")
    yield row(name, "copy_share", bandwidth / copied, "1")
    if eager is not None:
        yield row(name, "time_ratio", times.median / eager, "1")


def _row_maker(one: Pass, case: Case) -> Maker:
    dtype = next(name for name, dtype in DTYPES.items() if dtype == case.dtype)
    size = case.rows, case.width, one.operation.samples, dtype
    origin = _origin(case.device)

    def row(variant: str, metric: str, value: float, unit: str) -> Row:
        return Row(one.name, variant, *size, metric, significant(value), unit, *origin)

    return row


def _copy_row(device: torch.device, run: Run) -> Row:
    size = 1, timing.COPIED[device.type], 0, "uint8"
    return Row("copy", "device", *size, "bandwidth", significant(1e-9 * run.copied), "GB/s", *_origin(device))


def _origin(device: torch.device) -> tuple[str, str, str, str]:
    return device_name(device), torch.__version__, triton_version(), commit()


def _corner(tensor: Tensor) -> tuple[slice, ...]:
    """Where the first rows are in a tensor that has more of them."""
    return tuple(map(slice, tensor.shape))


def _gap(actual: Tensor, expected: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm
    return norm(actual.double() - expected) / norm(expected)


def _parser(device: torch.device) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [one.name for one in passes((1,))]
    kind = device.type
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS[kind], help="columns of a row")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS[kind], help="rows of a tensor")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"], help="of the rows; γ is float32")
    parser.add_argument("--operations", nargs="+", choices=names, default=names, help="which passes")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="whose; not all are everywhere"
    )
    parser.add_argument("--samples", nargs="+", type=int, default=SAMPLES, help="probes N of operations that have them")
    parser.add_argument("--repeats", type=int, default=REPEATS[kind], help="timed calls of each implementation")
    return parser


if __name__ == "__main__":
    main()
