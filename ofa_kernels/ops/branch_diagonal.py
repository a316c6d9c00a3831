"""`mlp_diagonal`, `attention_trace` and `attention_diagonal` on a GPU; see `reference.branch_diagonal`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ofa_kernels import launch
from ofa_kernels.ops.launching import multiprocessors, operation, start_by_names, tiles_of
from ofa_kernels.reference.branch_diagonal import check_attention_weights, check_mlp_weights


def mlp_diagonal(
    weights: Sequence[Tensor], down: Tensor, sums: Sequence[Tensor], scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `reference.mlp_diagonal`, with one read of the weights per 16 sequences; an image reads W_d once more."""
    check_mlp_weights(weights, down, sums)
    pairs = [(weights[0], sums[0]), (weights[1], sums[1]) if len(weights) > 1 else (None, None)]
    (gate, gate_sum), (up, up_sum) = pairs
    diagonal, image = call_mlp(gate, up, down, gate_sum, up_sum, scale)
    return diagonal, None if scale is None else image


def attention_trace(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    factor: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """As `reference.attention_trace`, with one read of the weights."""
    check_attention_weights(query, key, value, output, factor)
    trace: Tensor = call_trace(query, key, value, output, *sums, factor, scale)
    return trace


def attention_diagonal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `reference.attention_diagonal`, with one read of the weights; an image reads W_o once more."""
    check_attention_weights(query, key, value, output, scale)
    diagonal, image = call_diagonal(query, key, value, output, *sums, scale)
    return diagonal, None if scale is None else image


def forward_mlp(
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_sum: Tensor,
    up_sum: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel for every 16 sequences, and add up the programs' sums."""
    from ofa_kernels.kernels.branch_diagonal import mlp_diagonal_tiles

    (inner, width), parts = gate.shape, 1 if up is None else 2
    config = tiles_of(mlp_diagonal_tiles, gate)
    tiles, blocks = -(-width // config.block_columns), -(-inner // config.block_rows)
    runs = launch.shares(tiles, blocks, 8 * multiprocessors(gate.device))
    along = None if scale is None else gate.new_empty((tiles, parts, inner), dtype=torch.float32)
    diagonals = []
    for first in range(0, len(gate_sum), launch.SEQUENCES):
        of_gate = gate_sum[first : first + launch.SEQUENCES].contiguous()
        of_up = None if up_sum is None else up_sum[first : first + launch.SEQUENCES].contiguous()
        sequences = len(of_gate)
        diagonal = gate.new_empty((runs, sequences, width), dtype=torch.float32)
        arguments = {
            "gate": _matrix(gate),
            "up": _matrix(up),
            "down": _matrix(down),
            "gate_sum": (of_gate, inner),
            "up_sum": None if of_up is None else (of_up, inner),
            "scale": _vector(scale),
            "diagonal": diagonal,
            "along": along,
            "inner": inner,
            "width": width,
            "sequences": sequences,
            "runs": runs,
        }
        constants = {"SLOTS": 1 if sequences == 1 else launch.SEQUENCES}
        start_by_names(mlp_diagonal_tiles, tiles * runs, gate, config, arguments, constants)
        diagonals.append(diagonal.sum(0))
    diagonal = diagonals[0] if len(diagonals) == 1 else torch.cat(diagonals)
    if along is None:
        return diagonal, diagonal.new_empty(0)
    images = along.sum(0).unbind()
    vectors = images[0] * gate_sum
    if up_sum is not None:
        vectors = torch.addcmul(vectors, images[1], up_sum)
    return diagonal, _image(down.unsqueeze(0), vectors.unsqueeze(1))


def empty_mlp(gate: Tensor, up: Tensor | None, down: Tensor, gate_sum: Tensor, *more: object) -> tuple[Tensor, Tensor]:
    """The outputs, uninitialized; the image is empty without a scale."""
    diagonal = gate.new_empty((gate_sum.shape[0], gate.shape[1]), dtype=torch.float32)
    return diagonal, diagonal.new_empty(0) if more[-1] is None else torch.empty_like(diagonal)


def forward_trace(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    query_sum: Tensor,
    key_sum: Tensor,
    value_sum: Tensor,
    factor: Tensor,
    scale: Tensor | None,
) -> Tensor:
    """Launch the kernel, and add up the programs' sums."""
    from ofa_kernels.kernels.branch_diagonal import attention_trace_tiles

    sequences, heads, depth, width = query_sum.shape
    config = tiles_of(attention_trace_tiles, query, max(width, depth))
    programs = 3 * heads * -(-max(width, depth) // config.block_rows)
    traces = query.new_empty((programs, sequences), dtype=torch.float32)
    arguments = _attention_arguments(query, key, value, output, query_sum, key_sum, value_sum, scale)
    arguments |= {"factor": _vector(factor), "traces": traces, "sequences": sequences}
    constants = _attention_constants(query, query_sum.shape[2:])
    start_by_names(attention_trace_tiles, programs, query, config, arguments, constants)
    return traces.sum(0)


def empty_trace(query: Tensor, key: Tensor, value: Tensor, output: Tensor, query_sum: Tensor, *more: object) -> Tensor:
    """The output, uninitialized."""
    return query.new_empty(query_sum.shape[0], dtype=torch.float32)


def forward_diagonal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    query_sum: Tensor,
    key_sum: Tensor,
    value_sum: Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel, and add up the programs' sums."""
    from ofa_kernels.kernels.branch_diagonal import attention_diagonal_tiles

    (heads, depth, _), width = query_sum.shape, query.shape[2]
    config = tiles_of(attention_diagonal_tiles, query, max(query_sum.shape[1:]))
    tiles = -(-width // config.block_columns)
    runs = launch.shares(tiles, heads, 4 * multiprocessors(query.device))
    diagonal = query.new_empty((runs, width), dtype=torch.float32)
    along = None if scale is None else query.new_empty((tiles, heads, depth), dtype=torch.float32)
    arguments = _attention_arguments(query, key, value, output, query_sum, key_sum, value_sum, scale)
    arguments |= {"diagonal": diagonal, "along": along, "runs": runs}
    constants = _attention_constants(query, query_sum.shape[1:])
    start_by_names(attention_diagonal_tiles, tiles * runs, query, config, arguments, constants)
    total = diagonal.sum(0)
    if along is None:
        return total, total.new_empty(0)
    return total, _image(output, along.sum(0).unsqueeze(0))[0]


def empty_diagonal(query: Tensor, *more: object) -> tuple[Tensor, Tensor]:
    """The outputs, uninitialized; the image is empty without a scale."""
    diagonal = query.new_empty(query.shape[2], dtype=torch.float32)
    return diagonal, diagonal.new_empty(0) if more[-1] is None else torch.empty_like(diagonal)


def _image(weight: Tensor, vectors: Tensor) -> Tensor:
    """Σ_h W_h x_h of every sequence for a weight (heads, width, inner) and x, (B, heads, inner): (B, width)."""
    from ofa_kernels.kernels.branch_diagonal import image_rows

    (heads, width, inner), sequences = weight.shape, len(vectors)
    images = vectors.new_empty((sequences, width))
    config = tiles_of(image_rows, weight)
    arguments = {
        "weight": (weight, *weight.stride()),
        "vectors": vectors.contiguous(),
        "images": images,
        "heads": heads,
        "inner": inner,
        "width": width,
        "sequences": sequences,
    }
    start_by_names(image_rows, sequences * -(-width // config.block_rows), weight, config, arguments, {})
    return images


def _attention_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    query_sum: Tensor,
    key_sum: Tensor,
    value_sum: Tensor,
    scale: Tensor | None,
) -> dict[str, object]:
    weights = {"query": query, "key": key, "value": value, "output": output}
    return {
        **{name: (weight, *weight.stride()) for name, weight in weights.items()},
        "query_sum": query_sum.contiguous(),
        "key_sum": key_sum.contiguous(),
        "value_sum": value_sum.contiguous(),
        "scale": _vector(scale),
        "heads": query.shape[0],
        "groups": query.shape[0] // key.shape[0],
        "width": query.shape[2],
    }


def _attention_constants(query: Tensor, shape: Sequence[int]) -> dict[str, object]:
    depth, width = shape
    return {
        "EMULATED": query.device.type == "cpu" and query.dtype == torch.bfloat16,
        "HEAD": width,
        "VALUE": depth,
        "VALUE_TILE": launch.tile_width(depth),
    }


def _matrix(weight: Tensor | None) -> tuple[object, ...] | None:
    """A matrix as the group of a weight with one head."""
    return None if weight is None else (weight, 0, *weight.stride())


def _vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


call_mlp = operation("mlp_diagonal", forward_mlp, empty_mlp)
call_trace = operation("attention_trace", forward_trace, empty_trace)
call_diagonal = operation("attention_diagonal", forward_diagonal, empty_diagonal)
