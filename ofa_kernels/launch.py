"""How a kernel is launched: a pure function of the kernel, the row's width, the dtype and the architecture.

The thresholds follow from register counts, which the disassembly confirms (`python -m ofa_kernels.aot`); those that
only a timing can settle say so.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_WIDTH = 65536
"""Columns of the widest row that the tiled kernels take."""

MAX_PERTURBED_WIDTH = 16384
"""Columns of the widest row that `perturb` and `step_boundary` take: they hold a row in registers throughout."""

BLOCKED = ("perturb_forward", "perturb_backward", "step_boundary_forward", "step_boundary_backward")
"""Kernels whose row is one tile whatever its width."""

TILE = 16384
"""Widest tile of the others: 32 columns for each of 512 threads."""

SUMS_IN_REGISTERS = 4096
"""Widest row whose weight gradient is summed in registers beside a perturbed row: behind it they spill."""


@dataclass(frozen=True)
class Launch:
    """Tile and threads of one launch: a tile is `groups` × 32 columns, a row has `tiles` of them."""

    groups: int
    tiles: int
    num_warps: int
    in_memory: bool
    """Whether a program's weight gradient is summed in memory instead of in registers."""


def configure(kernel: str, width: int, itemsize: int, architecture: str) -> Launch:
    """The launch of `kernel` for rows of `width` columns of `itemsize` bytes on "sm_90", "gfx942" and the like.

    A tile is the power of two that holds the row, from 128 columns (one random counter) up. Threads are enough for
    two 16-byte accesses of bfloat16 each, four of float32, and at most 512: of 1024 threads each would be left with 64
    registers, fewer than a wide row needs.
    """
    block = max(128, 1 << (width - 1).bit_length())
    if kernel not in BLOCKED:
        block = min(block, TILE)
    threads = min(512, max(64, block // 16))
    warp = 64 if architecture.startswith("gfx") else 32
    return Launch(
        groups=block // 32,
        tiles=-(-width // block),
        num_warps=max(1, threads // warp),
        in_memory=kernel in BLOCKED and block > SUMS_IN_REGISTERS,
    )


def programs(rows: int, multiprocessors: int) -> int:
    """How many programs share the rows of a backward pass, each with a partial sum of its own.

    Four per multiprocessor hide one's reductions behind the others' loads and keep the partial sums small: 528 rows
    of them beside 8192 rows of the stream on an H200. Not measured yet.
    """
    return max(1, min(rows, 4 * multiprocessors))
