"""`attention_curvature` on a GPU: shapes and launches; see `reference.attention_curvature`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofa_kernels import launch, reference
from ofa_kernels.ops.launching import dense, multiprocessors, operation, start_by_names, tiles_of
from ofa_kernels.reference.attention_heads import Attends, HeadNorm, Rotary, check_heads, check_shapes, check_window


def attention_curvature(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    weights: Tensor,
    attends: Attends,
    *,
    rotary: Rotary | None = None,
    query_norm: HeadNorm | None = None,
    key_norm: HeadNorm | None = None,
    move: reference.Move | None = None,
) -> reference.AttentionSums:
    """As `reference.attention_curvature`, in two sweeps over the scores without storing them; no derivative.

    Products take their operands in the dtype of `query`; sums over tokens are float32 if that is float16.
    """
    given = (query, key, value, output, weights, attends)
    if refusal(query, value, query_norm, key_norm, move):
        return reference.attention_curvature(*given, rotary=rotary, query_norm=query_norm, key_norm=key_norm, move=move)
    check_heads(query, key, value, output)
    check_window(attends.window)
    check_shapes({"weights": (weights, (query.shape[0], query.shape[2]))})
    moves = (None,) * 5 if move is None else (move.query, move.key, move.value, move.read_value, move.read_output)
    query_sum, key_sum, value_sum, moved = call(
        query,
        key,
        value,
        output,
        weights,
        attends.mask,
        attends.sinks,
        *((None, None) if rotary is None else (rotary.cos, rotary.sin)),
        *((None, None) if query_norm is None else (query_norm.entering, query_norm.weight)),
        *((None, None) if key_norm is None else (key_norm.entering, key_norm.weight)),
        *moves,
        attends.scale,
        attends.causal,
        attends.window,
        attends.softcap,
        rotary is not None and rotary.interleaved,
        0.0 if query_norm is None else query_norm.eps,
        0.0 if key_norm is None else key_norm.eps,
    )
    return reference.AttentionSums(query_sum, key_sum, value_sum, None, None, None if move is None else moved)


def refusal(
    query: Tensor,
    value: Tensor,
    query_norm: HeadNorm | None,
    key_norm: HeadNorm | None,
    move: reference.Move | None,
) -> str | None:
    """Why a call needs the reference; None if the kernels accept it."""
    limit = launch.widest_head(query.element_size())
    if max(query.shape[-1], value.shape[-1]) > limit:
        return f"heads are wider than {limit} channels, and their tiles exceed registers and shared memory"
    if any(norm is not None and norm.joint for norm in (query_norm, key_norm)):
        return "a norm over all heads together needs the other heads, and a program has one"
    if move is not None and move.value.shape[1] != move.read_value.shape[1]:
        return "the move's values and their change have different numbers of heads"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    cosine: Tensor | None,
    sine: Tensor | None,
    query_entering: Tensor | None,
    query_scale: Tensor | None,
    key_entering: Tensor | None,
    key_scale: Tensor | None,
    move_query: Tensor | None,
    move_key: Tensor | None,
    move_value: Tensor | None,
    read_value: Tensor | None,
    read_output: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    interleaved: bool,
    query_eps: float,
    key_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the sweep by queries, the sweep by keys, and the sums over tokens."""
    from ofa_kernels.kernels.attention_curvature import (
        attention_curvature_keys,
        attention_curvature_queries,
        attention_curvature_sums,
    )

    (sequences, heads, tokens, width), depth = query.shape, value.shape[-1]
    read = 0 if read_value is None else read_value.shape[-1]
    widest = max(width, depth, read)
    wide = torch.bfloat16 if query.dtype == torch.bfloat16 else torch.float32

    def rows(channels: int, dtype: torch.dtype = wide) -> Tensor:
        return query.new_empty((sequences, heads, tokens, channels), dtype=dtype)

    numbers = query.new_empty((6, sequences, heads, tokens), dtype=torch.float32)
    mean_key, turned = rows(width), rows(width)
    pull = None if query_entering is None else rows(depth)
    moved = rows(read, torch.float32)
    weights, spread = dense(weights), _spread(mask, (sequences, heads, tokens, tokens))
    columns = {
        "query": query,
        "key": key,
        "value": value,
        "output": output,
        "query_entering": query_entering,
        "key_entering": key_entering,
        "move_query": move_query,
        "move_key": move_key,
        "move_value": move_value,
        "read_value": read_value,
        "read_output": read_output,
        "mean_key": mean_key,
        "turned": turned,
        "pull": pull,
        "moved": moved if read else None,
    }
    arguments: dict[str, object] = {
        **{name: None if x is None else _rows_of(x) for name, x in columns.items()},
        "cosine": None if cosine is None else _angles_of(cosine),
        "sine": None if sine is None else _angles_of(sine),
        "weights": (weights, weights.stride(0)),
        "mask": None if spread is None else (spread, *spread.stride()),
        "sinks": None if sinks is None else sinks.contiguous(),
        "query_scale": None if query_scale is None else query_scale.contiguous(),
        "key_scale": None if key_scale is None else key_scale.contiguous(),
        "numbers": numbers,
        "plane": numbers.stride(0),
        "tokens": tokens,
        "heads": heads,
        "groups": heads // key.shape[1],
        "read_groups": 1 if read_value is None else heads // read_value.shape[1],
        # Clamped to fit into 32 bits: a window over all keys is none.
        "window": None if window is None else min(window, 2 * tokens),
        "scale": scale,
        "softcap": softcap,
        "query_eps": query_eps,
        "key_eps": key_eps,
    }
    constants: dict[str, int] = {
        "NORMED": query_entering is not None,
        "CAUSAL": causal,
        "ADDITIVE": mask is not None and mask.dtype != torch.bool,
        "PER_QUERY": spread is not None and spread.stride(2) != 0,
        "EMULATED": query.device.type == "cpu" and query.dtype == torch.bfloat16,
        "INTERLEAVED": interleaved,
        "HEAD": width,
        "VALUE": depth,
        "READ": read,
        "TURN": 0 if cosine is None else cosine.shape[-1],
    }
    constants |= {
        f"{name}_TILE": launch.tile_width(max(1, constants[name])) for name in ("HEAD", "VALUE", "READ", "TURN")
    }

    crowded = query_entering is not None or move_query is not None or read > launch.WIDEST_READ
    config = tiles_of(attention_curvature_queries, query, widest, crowded=crowded)
    programs = sequences * heads * -(-tokens // config.block_rows)
    start_by_names(attention_curvature_queries, programs, query, config, arguments, constants)
    config = tiles_of(attention_curvature_keys, query, widest)
    programs = sequences * heads * -(-tokens // config.block_columns)
    start_by_names(attention_curvature_keys, programs, query, config, arguments, constants)

    # Products are float32, or bfloat16, which has float32's range.
    config = tiles_of(attention_curvature_sums, mean_key, widest)
    tiles = -(-width // config.block_columns) * -(-depth // config.block_columns)
    blocks = 2 * sequences * heads * tiles
    runs = launch.shares(blocks, -(-tokens // config.block_rows), 2 * multiprocessors(query.device))
    count = sequences * heads * depth * width
    sums = query.new_empty((runs, 2 * count + sequences * heads), dtype=torch.float32)
    start_by_names(
        attention_curvature_sums, blocks * runs, query, config, arguments | {"runs": runs, "sums": sums}, constants
    )
    total = sums[0] if runs == 1 else sums.sum(0)
    matrices = total[: 2 * count].view(2, sequences, heads, depth, width)
    return matrices[0], matrices[1], total[2 * count :].view(sequences, heads), moved


def empty(query: Tensor, key: Tensor, value: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs, uninitialized; `moved` is empty without a move."""
    sequences, heads, tokens, width = query.shape
    read_value = more[13]
    read = 0 if read_value is None else read_value.shape[-1]
    shape = sequences, heads, value.shape[-1], width
    shapes = shape, shape, (sequences, heads), (sequences, heads, tokens, read)
    return tuple(query.new_empty(one, dtype=torch.float32) for one in shapes)  # type: ignore[return-value]


def _rows_of(tensor: Tensor) -> tuple[object, ...]:
    """(B, heads, T, channels) with dense channels."""
    tensor = dense(tensor)
    return tensor, *tensor.stride()[:3]


def _angles_of(angle: Tensor) -> tuple[object, ...]:
    """(B or 1, T, pairs) with strides that broadcast over heads, and over sequences if there is one row."""
    angle = dense(angle)
    return angle, angle.stride(0) if angle.shape[0] > 1 else 0, 0, angle.stride(1)


def _spread(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """The mask as (B, heads, T, T), with stride 0 where it broadcasts."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        # As bytes: Triton takes a boolean for one bit.
        mask = mask.view(torch.uint8)
    elif mask.dtype == torch.float64:
        mask = mask.float()
    return mask.expand(shape)


call = operation("attention_curvature", forward, empty)
