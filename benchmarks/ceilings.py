"""Ceilings of a GPU: bytes per second of a large copy, and FLOP per second of a large bfloat16 product.

python -m benchmarks.ceilings --out benchmarks/results/ceilings_gpu.csv

Other figures of a GPU are compared with these, measured on the same machine in the same hour.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.table import commit, device_name, significant, writing

SIDE = {"cuda": 8192, "cpu": 512}
"""Rows and columns of the matrices: 1.1 TFLOP on a GPU, about 1.5 ms."""
REPEATS = {"cuda": 50, "cpu": 3}


@dataclass(frozen=True)
class Row:
    """One ceiling."""

    benchmark: str
    size: int
    dtype: str
    metric: str
    value: float
    unit: str
    device: str
    torch: str
    commit: str


def matrix_rate(device: torch.device, repeats: int) -> float:
    """FLOP per second of a square product of random bfloat16 matrices."""
    side = SIDE[device.type]
    # Not zeros, whose product is faster.
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    result = torch.empty_like(left)
    times = timing.measure([lambda: torch.mm(left, right, out=result)], device, repeats)
    return 2 * side**3 / (1e-3 * times.median)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, repeats = device.type, REPEATS[device.type]
    origin = device_name(device), torch.__version__, commit()
    copied, multiplied = timing.copy_bandwidth(device, repeats), matrix_rate(device, repeats)
    with writing(options.out, Row) as write:
        write([Row("copy", timing.COPIED[kind], "uint8", "bandwidth", significant(1e-9 * copied), "GB/s", *origin)])
        write([Row("product", SIDE[kind], "bf16", "rate", significant(1e-12 * multiplied), "TFLOP/s", *origin)])
    print(f"{origin[0]}: copy {1e-9 * copied:.0f} GB/s, bfloat16 product {1e-12 * multiplied:.1f} TFLOP/s")


if __name__ == "__main__":
    main()
