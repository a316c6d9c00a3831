"""`mlp_curvature` on a GPU: shapes and launches; what it computes is in `reference.mlp_curvature`."""

from __future__ import annotations

import torch
from torch import Tensor

from ofa_kernels import launch, reference
from ofa_kernels.ops.launching import dense, multiprocessors, operation, start, start_by_names, tiles_of
from ofa_kernels.reference.mlp_curvature import check_mlp

_BLOCK = 1024
"""Elements per program of `add_partials`."""


def mlp_curvature(
    gate: Tensor,
    up: Tensor | None,
    weights: Tensor,
    *,
    activation: str,
    read: Tensor | None = None,
    gate_shift: Tensor | None = None,
    up_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `reference.mlp_curvature`, in one read of the pre-activations; no derivative."""
    # Projecting the change onto all rows is a full matrix product, which PyTorch does better.
    if read is not None and read.shape[1] > launch.WIDEST_READ:
        return reference.mlp_curvature(
            gate, up, weights, activation=activation, read=read, gate_shift=gate_shift, up_shift=up_shift
        )
    check_mlp(gate, up, weights, activation)
    gate_sum, up_sum, moved = call(gate, up, weights, read, gate_shift, up_shift, activation)
    return gate_sum, None if up is None else up_sum, None if read is None else moved


def forward(
    gate: Tensor,
    up: Tensor | None,
    weights: Tensor,
    read: Tensor | None,
    gate_shift: Tensor | None,
    up_shift: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the sweep over the tokens, and add up the programs' sums."""
    from ofa_kernels.kernels.mlp_curvature import add_partials, mlp_curvature_tokens

    (sequences, tokens, width), parts = gate.shape, 1 if up is None else 2
    lines = 0 if read is None else read.shape[1]
    weights = dense(weights)
    config = tiles_of(mlp_curvature_tokens, gate)
    tiles = -(-width // config.block_columns)
    runs = launch.shares(sequences * tiles, -(-tokens // config.block_rows), 4 * multiprocessors(gate.device))
    sums = gate.new_empty((runs, parts, sequences, width), dtype=torch.float32)
    moved = gate.new_empty((tiles, sequences, tokens, lines), dtype=torch.float32)
    arguments: dict[str, object] = {
        "gate": _tokens_of(gate),
        "up": None if up is None else _tokens_of(up),
        "weights": (weights, weights.stride(0)),
        "read": None if read is None else _lines_of(read),
        "gate_shift": None if gate_shift is None else gate_shift.contiguous(),
        "up_shift": None if up_shift is None else up_shift.contiguous(),
        "sums": sums,
        "moved": moved,
        "tokens": tokens,
        "width": width,
        "runs": runs,
    }
    constants = {
        "ACTIVATION": activation,
        "EMULATED": gate.device.type == "cpu" and gate.dtype == torch.bfloat16,
        "READ": lines,
        "READ_TILE": launch.tile_width(max(1, lines)),
    }
    start_by_names(mlp_curvature_tokens, sequences * runs * tiles, gate, config, arguments, constants)
    total, change = sums[0], moved[0]
    if runs > 1 or (lines and tiles > 1):
        total = torch.empty_like(sums[0])
        change = torch.empty_like(moved[0])
        sizes = total.numel(), change.numel()
        blocks = sum(-(-size // _BLOCK) for size in sizes)
        args = sums, total, sizes[0], runs, moved if lines else None, change if lines else None, sizes[1], tiles
        start(add_partials, blocks, gate, args, {"BLOCK": _BLOCK}, None, num_warps=4)
    return total[0], total[1] if up is not None else sums.new_empty(0), change


def empty(
    gate: Tensor, up: Tensor | None, weights: Tensor, read: Tensor | None, *more: object
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, uninitialized; empty without `up` or `read`."""
    sequences, tokens, width = gate.shape
    gate_sum = gate.new_empty((sequences, width), dtype=torch.float32)
    up_sum = gate_sum.new_empty(0) if up is None else torch.empty_like(gate_sum)
    return gate_sum, up_sum, gate_sum.new_empty((sequences, tokens, 0 if read is None else read.shape[1]))


def _tokens_of(tensor: Tensor) -> tuple[object, ...]:
    """The group of (B, T, channels) with dense channels."""
    tensor = dense(tensor)
    return tensor, tensor.stride(0), tensor.stride(1)


def _lines_of(read: Tensor) -> tuple[object, ...]:
    read = dense(read)
    return read, read.stride(0) if read.shape[0] > 1 else 0, read.stride(1)


call = operation("mlp_curvature", forward, empty)
