"""How a kernel is launched: a pure function of the kernel, the row's width, the dtype and the architecture.

The tiles of attention and of the constants on sm_90 are the fastest of those that were timed, by
`benchmarks.tune_attention` for the sweeps. All other thresholds follow from register counts, which `python -m
ofa_kernels.aot` prints: the kernels of rows have been timed as they are launched here, but not tuned, for which there
is `benchmarks.tune_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

MAX_WIDTH = 65536
"""Columns of the widest row that the kernels take."""

HEAVY = ("perturb_backward", "step_boundary_backward")
"""Kernels that hold several tiles at once: the row, γ, the gradient, the sum of the weight's gradient."""

WALKING = ("mlp_trace_forward", "mlp_trace_backward", "norm_trace_backward")
"""Kernels that need no row as a whole and hold no tile while they work on the next."""


@dataclass(frozen=True)
class Launch:
    """Tile and threads of one launch: a tile is `groups` × 32 columns, a row has `tiles` of them."""

    groups: int
    tiles: int
    num_warps: int
    max_registers: int | None
    """Per thread, on NVIDIA; without a limit the assembler sets one of its own, and spills to keep it."""
    stages: int = 1
    """See `AttentionLaunch`; 1 where the loop over rows or samples loads a tile when it needs it."""


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
    if kernel in HEAVY:
        registers = 255
        if block > 4096:
            tile, threads = 2048, 256
        else:
            stages = 2
    if kernel in WALKING:
        tile = min(block, 2048)
        threads = max(64, tile // 8)
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
class AttentionLaunch:
    """Tiles and threads of one launch of an attention kernel: `block_rows` queries by `block_columns` keys at once."""

    block_rows: int
    block_columns: int
    num_warps: int
    num_stages: int
    """How many of the tiles that the inner loop reads are under way at once."""
    max_registers: int | None
    """See `Launch`."""


_HALF_TILES: dict[str, dict[int, tuple[int, int, int, int | None]]] = {
    "attention_moments_forward": {64: (64, 32, 4, 255), 128: (32, 32, 4, 255), 256: (32, 16, 8, 255)},
    "attention_moments_backward_rows": {64: (32, 32, 4, 255), 128: (32, 32, 8, 255), 256: (32, 16, 8, 255)},
    "attention_moments_backward_keys": {64: (32, 32, 4, 255), 128: (16, 32, 8, 255), 256: (16, 16, 8, 240)},
    "attention_moments_backward_values": {64: (32, 64, 4, 255), 128: (32, 32, 4, 255), 256: (16, 32, 4, 255)},
    "attention_trace_features": {64: (32, 16, 4, 255), 128: (32, 16, 8, 255)},
    "attention_trace_combine": {64: (32, 16, 4, 255), 128: (32, 16, 8, 255)},
    "attention_trace_backward_own": {64: (32, 16, 4, 255), 128: (16, 16, 8, 255)},
    "attention_trace_backward_tokens": {64: (16, 16, 4, 255), 128: (16, 16, 8, 255)},
    "attention_trace_backward_constants": {64: (32, 16, 4, 255), 128: (32, 16, 8, 255)},
}
"""Queries, keys, warps and registers of each attention kernel in 16 bits, up to a tile's width in channels."""

_SHIFTED_TILES: dict[str, dict[int, tuple[int, int, int, int | None]]] = {
    "attention_trace_combine": {64: (16, 16, 4, 255)},
    "attention_trace_backward_own": {64: (16, 16, 4, 255)},
}
"""Where heads have shifts, on NVIDIA: sm_100 spills with 32 rows, of 252 registers without; 16 have 112 and 148."""

_HOPPER_TILES: dict[str, dict[int, tuple[int, int, int, int]]] = {
    # 1 x 2048 tokens of 32 heads of 128: 0.27 ms, where 128 x 32 takes 0.31, 64 x 32 on four warps 0.34, 32 x 32 0.63.
    "attention_moments_forward": {64: (64, 64, 4, 2), 128: (128, 64, 8, 2)},
    # 0.35 ms; 64 x 32 on four warps 0.37, two stages instead of three 0.41, one 0.51, 32 x 32 0.67.
    "attention_moments_backward_rows": {64: (64, 64, 4, 2), 128: (128, 32, 8, 3)},
    # 0.35 ms; with a second loop for what is not masked 0.47, and then 32 x 128 on eight warps 0.50, 64 x 64 0.67.
    "attention_moments_backward_keys": {64: (64, 64, 4, 2), 128: (32, 64, 4, 2)},
    # 0.24 ms, and 0.084 for 4 x 512 tokens; 64 x 128 on eight warps 0.23 and 0.093, 32 x 128 0.25 and 0.092.
    "attention_moments_backward_values": {64: (64, 64, 4, 2), 128: (32, 64, 4, 3)},
    "attention_trace_features": {64: (64, 16, 4, 2), 128: (64, 16, 8, 2)},
    "attention_trace_combine": {64: (64, 16, 4, 2), 128: (64, 16, 8, 2)},
    "attention_trace_backward_own": {64: (64, 16, 4, 2), 128: (64, 16, 8, 2)},
    "attention_trace_backward_tokens": {64: (64, 16, 4, 2), 128: (64, 16, 8, 2)},
    "attention_trace_backward_constants": {64: (64, 16, 4, 2), 128: (64, 16, 8, 2)},
}
"""Queries, keys, warps and stages of the sweeps in 16 bits on sm_90, the fastest of `benchmarks.tune_attention`.

Its products want 64 rows of the outer side for each four warps. Measured on an H200, PyTorch 2.11, Triton 3.6.
"""


@cache
def configure_attention(
    kernel: str, width: int, itemsize: int, architecture: str, crowded: bool = False
) -> AttentionLaunch:
    """The launch of an attention `kernel` whose widest tensor has heads of `width` channels of `itemsize` bytes.

    A thread holds a share of every sum over the other side and of five tiles of scores. Each entry above is the largest
    found at which no architecture that is compiled ahead of time spills one of them, but on sm_90, where what was
    measured to be fastest is taken, spills or none. In float32 products are made by multiply-adds of single numbers, 16
    by 16, the smallest tile there is. Two stages copy a tile into shared memory while the last one is worked on,
    without going through registers, and in 99 KiB, which sm_86 has; gfx942 has 64. A mask of every pair or a tangent
    of the queries' own (`crowded`) is one more tile of each sweep, for which the large ones of sm_90 leave no room; to
    what goes token by token, `crowded` are heads with shifts. Where no limit of registers is given, the assembler
    spills less with one of its own.
    """
    sweeps = not kernel.startswith("attention_trace")
    tile, warp, stages = tile_width(width), 64 if architecture.startswith("gfx9") else 32, 2
    registers: int | None
    measured = None
    if architecture == "sm_90" and itemsize <= 2 and not (crowded and sweeps):
        measured = _HOPPER_TILES.get(kernel, {}).get(max(64, tile))
    if measured is not None:
        (rows, columns, warps, stages), registers = measured, 255
    elif itemsize <= 2:
        shifted = _SHIFTED_TILES.get(kernel, {}) if crowded and architecture.startswith("sm_") else {}
        rows, columns, warps, registers = {**_HALF_TILES[kernel], **shifted}[max(64, tile)]
    elif kernel == "attention_moments_backward_keys":
        # For heads of up to 64 eight warps have too few registers by some, and of 128 four: 1.5 kB for each thread go
        # to memory on sm_90, and on eight none, but 80 bytes with a mask of every pair.
        rows, columns, warps, registers = 16, 16, 4 if tile < 128 else 8, None
    else:
        rows, columns, warps, registers = 16, 16, 8, 255
    if architecture.startswith("gfx"):
        # Eight warps of 64 threads would have 256 registers each, where four have 512.
        warps, registers = 4, None
    # A thread copies 16 bytes or more of the smaller tile; what goes token by token has rows alone.
    smaller = min(rows, columns) if sweeps else rows
    warps = min(warps, max(1, smaller * tile * itemsize // (16 * warp)))
    return AttentionLaunch(rows, columns, warps, num_stages=stages, max_registers=registers)


def attention_runs(blocks: int, heads: int, multiprocessors: int) -> int:
    """How many runs share the blocks of rows that each head's gradients of M_q and M_k are summed over.

    Two programs for each run and head: enough for two on every multiprocessor, and no run without a block.
    """
    return max(1, min(blocks, -(-multiprocessors // heads)))


def tile_width(width: int) -> int:
    """Channels of a tile that holds heads of `width`: a power of two, and what a product takes at least."""
    return max(16, 1 << (width - 1).bit_length())


def widest_head(itemsize: int) -> int:
    """The widest heads that the attention kernels take: wider tiles fit neither into registers nor shared memory."""
    return 256 if itemsize <= 2 else 128


WIDEST_WEIGHTS = 256
"""Channels of the widest heads whose weights' constants the kernels compute."""


@dataclass(frozen=True)
class ConstantsLaunch:
    """Tiles and threads of one launch of a kernel of `kernels.constants`."""

    block_rows: int
    """Inner channels of an MLP, or channels of a head, at once."""
    block_width: int
    """Channels of the norm at once."""
    num_warps: int
    num_stages: int
    """See `AttentionLaunch`."""
    max_registers: int | None
    """See `Launch`."""
    waves: int
    """How many programs there should be for each multiprocessor."""


_HOPPER_CONSTANTS = {
    # A layer of Llama-2-7B: 0.12 ms; eight warps 0.16 with any number of stages or programs.
    "mlp_constants_forward": ConstantsLaunch(64, 64, 4, num_stages=1, max_registers=255, waves=8),
    # 0.11 ms; 64 x 64 on four warps 0.11 to 0.13, on eight 0.22, 64 x 32 on eight 0.28.
    "attention_constants_forward": ConstantsLaunch(128, 32, 8, num_stages=3, max_registers=255, waves=2),
    # 0.097 ms; 128 x 64 on four warps 0.096 with spills, 32 x 64 on four 0.117, 64 x 64 0.14, 16 x 64 on eight 0.37.
    "attention_constants_backward": ConstantsLaunch(64, 128, 8, num_stages=1, max_registers=255, waves=1),
}
"""Launches in 16 bits on sm_90, those of attention for heads of 128; H200, PyTorch 2.11, Triton 3.6."""


def configure_constants(kernel: str, width: int, itemsize: int, architecture: str) -> ConstantsLaunch:
    """The launch of a `kernel` of constants for weights of `itemsize` bytes; `width` is that of a head, if it has any.

    Rows of a tile are 128 bytes long where they can be, a line of the cache, whichever dimension is dense. An MLP's
    tiles are multiplied element by element, and a few programs of 128 registers share a multiprocessor, so that one
    loads while another adds. An attention's forward kernel holds 64 by 64 of both products; 128 by 128 would spill. Its
    backward kernel holds a block of L, as wide as a head, and reads M̄ anew for every block: the longer, the fewer. Each
    is the largest found that spills on no architecture that is compiled ahead of time, in 64 KiB of shared memory. In
    float32 products are made by multiply-adds of single numbers, whose operands fill the registers. On sm_90 what was
    measured to be fastest is taken.
    """
    amd, half, tile = architecture.startswith("gfx"), itemsize <= 2, tile_width(width)
    if architecture == "sm_90" and half and (kernel.startswith("mlp") or tile == 128) and kernel in _HOPPER_CONSTANTS:
        return _HOPPER_CONSTANTS[kernel]
    if kernel.startswith("mlp"):
        rows, columns, warps, stages, registers, waves = (64, 64, 8, 1, 128, 8) if half else (32, 32, 4, 1, 128, 8)
    elif kernel == "attention_constants_forward":
        # With two stages the assembler of sm_80 spills what a LayerNorm needs besides.
        rows, columns, stages = min(tile, 64), 32 if half else 16, 3 if half else 2
        # A thread reads 16 bytes of a tile.
        threads = rows * columns * itemsize // 16
        warps, registers, waves = max(1, threads // (64 if amd else 32)), 255, 2
    else:
        rows, columns = (32 if tile < 128 else 16, 64 if tile <= 128 else 32) if half else (16, 32)
        warps, stages, registers, waves = 8 if tile > 64 or not half else 4, 2, 255, 1
    if amd:
        return ConstantsLaunch(rows, columns, min(warps, 4), min(stages, 2), None, waves)
    return ConstantsLaunch(rows, columns, warps, stages, registers, waves)


def shares(blocks: int, tiles: int, programs: int) -> int:
    """Into how many sums of neighbouring tiles that of `tiles` is split, so that `blocks` of them are `programs`.

    Fewer where they would be more than the tiles; each has a tile at least, and all but the last as many.
    """
    if blocks * tiles == 0:
        return 1
    each = -(-tiles // max(1, min(tiles, programs // blocks)))
    return -(-tiles // each)
