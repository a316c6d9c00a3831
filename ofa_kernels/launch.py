"""Launch settings, a pure function of the kernel, the row's width, the dtype and the architecture.

All thresholds follow from register counts, which `python -m ofa_kernels.aot` prints. Row kernels have been timed with
these settings but not tuned (`benchmarks.tune_rows` does that); curvature kernels have not been timed yet
(`benchmarks.curvature_kernels` does that).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

MAX_WIDTH = 65536
"""Columns of the widest row that the kernels accept."""

REGISTER_HEAVY = ("perturb_backward",)
"""Kernels that hold several tiles in registers: the row, γ, the gradient, the sum of the weight's gradient."""


REGISTERS = 65536
"""Registers of a multiprocessor."""

SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
"""Shared memory limit of a program, in bytes; the compiler does not check it, the launch does."""


@dataclass(frozen=True)
class Launch:
    """Settings of one launch of a row kernel: a row is `tiles` tiles of `groups` × 32 columns."""

    groups: int
    tiles: int
    num_warps: int
    max_registers: int | None
    """Per thread, on NVIDIA; None leaves the limit to the assembler."""
    stages: int = 1
    """Stages of the loop over rows or samples: with n, n − 1 tiles of every load are in shared memory. With 2 the next
    tile is loaded when this one is done with, and only 3 load it meanwhile; 1 loads each tile when it is needed."""


@cache
def configure(kernel: str, width: int, itemsize: int, architecture: str) -> Launch:
    """The launch of `kernel` for rows of `width` columns of `itemsize` bytes on "sm_90", "gfx942" and the like.

    A tile is the power of two that holds the row, at least 128 columns (one random counter).

    - A thread takes 16 columns: two 16-byte accesses of bfloat16, four of float32. With more than 512 threads each has
      only 64 registers, fewer than a row needs. So wider rows have 32 columns per thread, then several tiles.
    - 128 registers let two programs of 256 threads share a multiprocessor.
    - Register-heavy kernels need more. Above 4096 columns they would spill anyway, so they loop over tiles of 2048
      columns with 256 threads. Up to there a multiprocessor has one program (140 registers and more), so two stages
      load a sample's gradients while the previous ones are summed: 3 % more instructions, no more registers, not yet
      timed.
    - norm_step_backward loads a row while it computes the one before, where both fit in shared memory. Where that
      leaves room for one program, it may have all registers.

    No threshold depends on the dtype: loaded float32 rows take as many registers.
    """
    block = max(128, 1 << (width - 1).bit_length())
    tile, threads, registers, stages = min(block, 16384), min(512, max(64, block // 16)), 128, 1
    if kernel in REGISTER_HEAVY:
        registers = 255
        if block > 4096:
            tile, threads = 2048, 256
        else:
            stages = 2
    if kernel == "norm_step_backward" and not architecture.startswith("gfx"):
        # Two rows of four tensors, and what the reductions and the last stores turn around.
        needed, shared = 2 * 4 * tile * itemsize + 4 * tile, SHARED.get(architecture, SHARED["sm_86"])
        if needed <= shared:
            stages = 3
            registers = 128 if 2 * needed <= shared else min(255, REGISTERS // threads)
    # AMD's data-centre chips, gfx9…, have 64 threads per warp; its other chips have 32.
    warp = 64 if architecture.startswith("gfx9") else 32
    return Launch(
        groups=tile // 32,
        tiles=-(-width // tile),
        num_warps=threads // warp,
        max_registers=None if architecture.startswith("gfx") else registers,
        stages=stages,
    )


def programs(rows: int, multiprocessors: int) -> int:
    """Number of programs that share the rows of a backward pass, each with its own partial sum.

    Four per multiprocessor overlap one's reductions with the others' loads. But each writes a float32 row that is read
    again: with 8 bfloat16 rows per program, a sixth of the norm gradient's traffic. At least one per multiprocessor.
    """
    return max(1, min(rows, 4 * multiprocessors, max(multiprocessors, rows // 8)))


@dataclass(frozen=True)
class TileLaunch:
    """Settings of one launch of a curvature kernel; each kernel defines its rows and columns."""

    block_rows: int
    block_columns: int
    num_warps: int
    num_stages: int
    """Loads of the inner loop in flight at once."""


_SWEEPS = {
    # Queries by keys. A program's sums are as wide as a head, and with four warps a thread has 255 registers.
    "attention_curvature_queries": {64: (64, 32, 4), 128: (64, 32, 8), 256: (32, 16, 8)},
    "attention_curvature_keys": {64: (32, 64, 4), 128: (32, 64, 8), 256: (16, 32, 8)},
}
"""Rows, columns and warps of the sweeps in 16 bits, up to a tile's width in channels."""

_HOPPER_SWEEPS = {
    # Matrix products use 64 rows per four warps; measured fastest on an H200 for sweeps with as many sums.
    "attention_curvature_queries": {64: (64, 64, 4), 128: (128, 64, 8)},
    "attention_curvature_keys": {64: (64, 64, 4), 128: (32, 64, 4)},
}
"""As `_SWEEPS`, on sm_90."""

_TILES = {
    # Tokens by channels of both sides: 64 × 64 sums from four loaded tiles.
    "attention_curvature_sums": ((32, 64, 8, 2), (16, 32, 4, 1)),
    # Tokens by inner channels: a tile's row is one 128-byte cache line.
    "mlp_curvature_tokens": ((32, 64, 4, 1), (32, 32, 4, 1)),
    # Inner channels by the norm's: tiles of both weights have 128-byte lines, one of them transposed.
    "mlp_diagonal_tiles": ((64, 64, 8, 1), (32, 32, 4, 1)),
    # Channels of a head by the norm's.
    "attention_trace_tiles": ((32, 64, 4, 2), (16, 32, 4, 1)),
    "attention_diagonal_tiles": ((32, 64, 8, 2), (16, 32, 8, 1)),
    # The norm's channels by inner ones.
    "image_rows": ((16, 128, 4, 1), (16, 64, 4, 1)),
}
"""Rows, columns, warps and stages of the other kernels, in 16 bits and in float32."""


@cache
def configure_tiles(kernel: str, width: int, itemsize: int, architecture: str, crowded: bool = False) -> TileLaunch:
    """The launch of a curvature `kernel` for heads of `width` channels (if it has heads) of `itemsize` bytes.

    A `crowded` sweep (norms on the heads, or a move) has more sums and so half as many columns; with half as many rows
    instead it spills 13 kB. Float32 products are scalar multiply-adds, whose operands fill the registers, so tiles are
    small. AMD's warps have 64 threads, and its programs 64 KiB of shared memory.
    """
    amd, tile = architecture.startswith("gfx"), tile_width(width)
    if kernel in _SWEEPS:
        hopper = architecture == "sm_90" and not crowded
        tiles = _SWEEPS[kernel] | (_HOPPER_SWEEPS[kernel] if hopper else {})
        rows, columns, warps = tiles[max(64, tile)] if itemsize <= 2 else (16, 16, 4)
        columns, stages = max(16, columns // 2) if crowded else columns, 2
    else:
        rows, columns, warps, stages = _TILES[kernel][itemsize > 2]
    return TileLaunch(rows, columns, min(warps, 4) if amd else warps, 1 if amd else stages)


def tile_width(width: int) -> int:
    """Channels of a tile that holds heads of `width`: a power of two, at least 16, the minimum of a matrix product."""
    return max(16, 1 << (width - 1).bit_length())


def widest_head(itemsize: int) -> int:
    """The widest heads that the attention kernels accept: wider tiles exceed registers and shared memory."""
    return 256 if itemsize <= 2 else 128


WIDEST_READ = 16
"""Most rows of an MLP's last projection that its change is projected onto in the sweep; more are a separate product."""

SEQUENCES = 16
"""Sequences whose diagonals one read of an MLP's weights serves."""


def shares(blocks: int, tiles: int, programs: int) -> int:
    """Number of runs of consecutive tiles to split `tiles` into, so that `blocks` × runs is about `programs`.

    All runs but the last have the same number of tiles, at least one.
    """
    if blocks * tiles == 0:
        return 1
    each = -(-tiles // max(1, min(tiles, programs // blocks)))
    return -(-tiles // each)
