"""How a kernel is launched: a pure function of the kernel, the row's width, the dtype and the architecture.

The thresholds follow from register counts, which `python -m ofa_kernels.aot` prints; none has been timed yet.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_WIDTH = 65536
"""Columns of the widest row that the kernels take."""

HEAVY = ("perturb_backward", "step_boundary_backward")
"""Kernels that hold several tiles at once: the row, γ, the gradient, the sum of the weight's gradient."""


@dataclass(frozen=True)
class Launch:
    """Tile and threads of one launch: a tile is `groups` × 32 columns, a row has `tiles` of them."""

    groups: int
    tiles: int
    num_warps: int
    max_registers: int | None
    """Per thread, on NVIDIA; without a limit the assembler sets one of its own, and spills to keep it."""


def configure(kernel: str, width: int, itemsize: int, architecture: str) -> Launch:
    """The launch of `kernel` for rows of `width` columns of `itemsize` bytes on "sm_90", "gfx942" and the like.

    A tile is the power of two that holds the row, from 128 columns (one random counter) up. A thread takes 16 columns
    of it: two 16-byte accesses of bfloat16, four of float32. More than 512 threads would leave each with 64 registers,
    fewer than a row needs, so that wider rows take 32 columns per thread, and then several tiles. 128 registers let
    two programs of 256 threads share a multiprocessor. The heavy kernels need more; behind 4096 columns, where they
    would spill all the same, they go on in tiles of 8 columns for each of 256 threads. No threshold depends on the
    dtype so far: float32 rows take as many registers once they are loaded.
    """
    block = max(128, 1 << (width - 1).bit_length())
    tile, threads, registers = min(block, 16384), min(512, max(64, block // 16)), 128
    if kernel in HEAVY:
        registers = 255
        if block > 4096:
            tile, threads = 2048, 256
    # AMD's data-centre chips, gfx9…, have 64 threads to a warp, its others 32 as NVIDIA's.
    warp = 64 if architecture.startswith("gfx9") else 32
    return Launch(
        groups=tile // 32,
        tiles=-(-width // tile),
        num_warps=threads // warp,
        max_registers=None if architecture.startswith("gfx") else registers,
    )


def programs(rows: int, multiprocessors: int) -> int:
    """How many programs share the rows of a backward pass, each with a partial sum of its own.

    Four per multiprocessor hide one's reductions behind the others' loads, but each writes a row of float32 that is
    read again: with 8 rows of bfloat16 to each, a sixth of what a norm's gradient moves anyway. Never fewer than one
    per multiprocessor.
    """
    return max(1, min(rows, 4 * multiprocessors, max(multiprocessors, rows // 8)))
