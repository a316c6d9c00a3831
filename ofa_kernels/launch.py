"""How a kernel is launched: a pure function of the kernel, the row's width, the dtype and the architecture.

All thresholds follow from register counts, which `python -m ofa_kernels.aot` prints: the kernels of rows have been
timed as they are launched here, but not tuned, for which there is `benchmarks.tune_rows`; those of the curvature have
not been timed yet, for which there is `benchmarks.curvature_kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

MAX_WIDTH = 65536
"""Columns of the widest row that the kernels take."""

REGISTER_HEAVY = ("perturb_backward", "step_boundary_backward")
"""Kernels that hold several tiles at once: the row, γ, the gradient, the sum of the weight's gradient."""


@dataclass(frozen=True)
class Launch:
    """Tile and threads of one launch: a tile is `groups` × 32 columns, a row has `tiles` of them."""

    groups: int
    tiles: int
    num_warps: int
    max_registers: int | None
    """Per thread, on NVIDIA; without a limit the assembler sets one of its own, and spills to keep it."""
    stages: int = 1
    """See `TileLaunch`; 1 where the loop over rows or samples loads a tile when it needs it."""


@cache
def configure(kernel: str, width: int, itemsize: int, architecture: str) -> Launch:
    """The launch of `kernel` for rows of `width` columns of `itemsize` bytes on "sm_90", "gfx942" and the like.

    A tile is the power of two that holds the row, from 128 columns (one random counter) up. A thread takes 16 columns
    of it: two 16-byte accesses of bfloat16, four of float32. More than 512 threads would leave each with 64 registers,
    fewer than a row needs, so that wider rows take 32 columns per thread, and then several tiles. 128 registers let
    two programs of 256 threads share a multiprocessor. The heavy kernels need more; behind 4096 columns, where they
    would spill all the same, they go on in tiles of 8 columns for each of 256 threads. So do those that walk through a
    row, whatever its width: a tile is all that they hold. Where the heavy kernels' row is one tile, 140 registers and
    more leave one program to a multiprocessor, with nobody to work while it waits for memory: the gradients of a sample
    are under way while those of the one before are summed, for 3 % more instructions and no more registers. That this
    is faster is a prediction. No threshold depends on the dtype so far: float32 rows take as many registers once they
    are loaded.
    """
    block = max(128, 1 << (width - 1).bit_length())
    tile, threads, registers, stages = min(block, 16384), min(512, max(64, block // 16)), 128, 1
    if kernel in REGISTER_HEAVY:
        registers = 255
        if block > 4096:
            tile, threads = 2048, 256
        else:
            stages = 2
    # AMD's data-centre chips, gfx9…, have 64 threads to a warp, its others 32 as NVIDIA's.
    warp = 64 if architecture.startswith("gfx9") else 32
    return Launch(
        groups=tile // 32,
        tiles=-(-width // tile),
        num_warps=threads // warp,
        max_registers=None if architecture.startswith("gfx") else registers,
        stages=stages,
    )


def programs(rows: int, multiprocessors: int) -> int:
    """How many programs share the rows of a backward pass, each with a partial sum of its own.

    Four per multiprocessor hide one's reductions behind the others' loads, but each writes a row of float32 that is
    read again: with 8 rows of bfloat16 to each, a sixth of what a norm's gradient moves anyway. Never fewer than one
    per multiprocessor.
    """
    return max(1, min(rows, 4 * multiprocessors, max(multiprocessors, rows // 8)))


@dataclass(frozen=True)
class TileLaunch:
    """Tiles and threads of one launch of a kernel of the curvature; what rows and columns are is the kernel's."""

    block_rows: int
    block_columns: int
    num_warps: int
    num_stages: int
    """How many of the tiles that the inner loop reads are under way at once."""


_SWEEPS = {
    # Queries by keys. The sums of a program are as wide as a head, and a thread of four warps has 255 registers.
    "attention_curvature_queries": {64: (64, 32, 4), 128: (64, 32, 8), 256: (32, 16, 8)},
    "attention_curvature_keys": {64: (32, 64, 4), 128: (32, 64, 8), 256: (16, 32, 8)},
}
"""Rows, columns and warps of the sweeps in 16 bits, up to a tile's width in channels."""

_HOPPER_SWEEPS = {
    # Products want 64 rows of the outer side for each four warps: the tiles that were measured to be the fastest of
    # sweeps with as many sums as these, on an H200.
    "attention_curvature_queries": {64: (64, 64, 4), 128: (128, 64, 8)},
    "attention_curvature_keys": {64: (64, 64, 4), 128: (32, 64, 4)},
}
"""The same on sm_90."""

_TILES = {
    # Tokens by channels of both sides: 64 × 64 sums, and four tiles that are read for them.
    "attention_curvature_sums": ((32, 64, 8, 2), (16, 32, 4, 1)),
    # Tokens by inner channels: a row of the tile is a line of the cache, 128 bytes.
    "mlp_curvature_tokens": ((32, 64, 4, 1), (32, 32, 4, 1)),
    # Inner channels by the norm's: both weights' tiles have lines of 128 bytes, one of them read across.
    "mlp_diagonal_tiles": ((64, 64, 8, 1), (32, 32, 4, 1)),
    # Channels of a head by the norm's.
    "attention_trace_tiles": ((32, 64, 4, 2), (16, 32, 4, 1)),
    "attention_diagonal_tiles": ((32, 64, 8, 2), (16, 32, 8, 1)),
    # The norm's channels by inner ones.
    "image_rows": ((16, 128, 4, 1), (16, 64, 4, 1)),
}
"""Rows, columns, warps and stages of what is no sweep, in 16 bits and in float32."""


@cache
def configure_tiles(kernel: str, width: int, itemsize: int, architecture: str, crowded: bool = False) -> TileLaunch:
    """The launch of a `kernel` of the curvature for heads of `width` channels, where it has any, of `itemsize` bytes.

    A sweep that is `crowded`, by norms on the heads or a move of their own, has more sums: half as many columns. With
    half as many rows instead the assembler keeps 32 registers and spills 13 kB.
    In float32 products are made by multiply-adds of single numbers, whose operands fill the registers: small tiles.
    AMD's warps have 64 threads, and programs 64 KiB of shared memory.
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
    """Channels of a tile that holds heads of `width`: a power of two, and what a product takes at least."""
    return max(16, 1 << (width - 1).bit_length())


def widest_head(itemsize: int) -> int:
    """The widest heads that the attention kernels take: wider tiles fit neither into registers nor shared memory."""
    return 256 if itemsize <= 2 else 128


WIDEST_READ = 16
"""Rows of an MLP's last projection that its change is read through at most; all of them are a product of its own."""

SEQUENCES = 16
"""Sequences whose diagonals one read of an MLP's weights serves."""


def shares(blocks: int, tiles: int, programs: int) -> int:
    """Into how many runs of neighbouring tiles that of `tiles` is split, so that `blocks` of them are `programs`.

    Fewer where they would be more than the tiles; each has a tile at least, and all but the last as many.
    """
    if blocks * tiles == 0:
        return 1
    each = -(-tiles // max(1, min(tiles, programs // blocks)))
    return -(-tiles // each)
