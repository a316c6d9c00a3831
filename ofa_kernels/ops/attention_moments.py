"""`attention_moments` on a GPU: schema, shapes, autograd and launches; see `reference.attention_moments`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofa_kernels import launch
from ofa_kernels.ops.launching import Derivative, library, operation, start, target
from ofa_kernels.reference.attention_moments import check_attention

Group = tuple[Any, ...]
"""A tensor and its strides, as the kernels take them."""

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor output, Tensor angle, Tensor turn, Tensor aim, Tensor? tangent, "
    "Tensor? mask"
)
_SETTINGS = "float scale, bool causal, SymInt? window"

library.define(f"attention_moments({_INPUTS}, {_SETTINGS}) -> (Tensor lse, Tensor mean, Tensor covariance)")
library.define(
    f"attention_moments_backward({_INPUTS}, Tensor lse, Tensor? grad_lse, Tensor? grad_mean, Tensor? grad_covariance, "
    f"{_SETTINGS}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_output, Tensor grad_turn, "
    "Tensor grad_aim, Tensor grad_tangent)"
)


def attention_moments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    angle: Tensor,
    turn: Tensor,
    aim: Tensor,
    tangent: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.attention_moments`, without a matrix of all scores; differentiable once, not in angle and mask.

    Products take their operands in the dtype of `query`, whatever the others are stored in.

    Raises:
        ValueError: shapes that do not match, or heads wider than `launch.widest_head`.
    """
    check_attention(query, key, value, output, angle, turn, aim, tangent, window)
    widest, limit = max(query.shape[-1], value.shape[-1], angle.shape[-1]), launch.widest_head(query.element_size())
    if widest > limit:
        raise ValueError(
            f"heads of {widest} channels are wider than the {limit} that the kernels take in {query.dtype}"
        )
    result: tuple[Tensor, Tensor, Tensor] = call(
        query, key, value, output, angle, turn, aim, tangent, mask, scale, causal, window
    )
    return result


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    angle: Tensor,
    turn: Tensor,
    aim: Tensor,
    tangent: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel: (lse, mean, covariance)."""
    from ofa_kernels.kernels.attention_moments import attention_moments_forward

    outputs = empty(query, key, value, output, angle, turn, aim, tangent, mask)
    attention = _Attention(query, key, value, output, angle, turn, aim, tangent, mask, scale, causal, window)
    lse, mean, covariance = outputs
    attention.add(lse=lse, mean=mean, covariance=_rows(covariance))
    attention.over_queries(attention_moments_forward)
    return outputs


def empty(query: Tensor, key: Tensor, value: Tensor, output: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of the forward pass, unwritten."""
    lse, mean = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(2))
    return lse, mean, query.new_empty(output.shape)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    angle: Tensor,
    turn: Tensor,
    aim: Tensor,
    tangent: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    grad_lse: Tensor | None,
    grad_mean: Tensor | None,
    grad_covariance: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernels: gradients of query, key, value, output, turn, aim and tangent.

    All have their tensor's shape, and are zeros where nothing that came in depends on it; that of a missing tangent is
    empty.
    """
    from ofa_kernels.kernels.attention_moments_backward import (
        attention_moments_backward_columns,
        attention_moments_backward_rows,
        attention_moments_backward_turns,
    )

    grads = empty_gradients(query, key, value, output, angle, turn, aim, tangent)
    d_query, d_key, d_value, d_output, d_turn, d_aim, d_tangent = grads
    attention = _Attention(query, key, value, output, angle, turn, aim, tangent, mask, scale, causal, window)
    pull, offset = (torch.empty_like(lse, memory_format=torch.contiguous_format) for _ in range(2))
    attention.add(
        lse=lse.contiguous(),
        grad_lse=None if grad_lse is None else grad_lse.contiguous(),
        grad_mean=None if grad_mean is None else grad_mean.contiguous(),
        grad_covariance=_rows(None if grad_covariance is None else grad_covariance.to(query.dtype)),
        pull=pull,
        offset=None if grad_covariance is None else offset,
        grad_query=_rows(d_query),
        grad_key=_rows(d_key),
        grad_value=_rows(d_value),
        grad_output=_rows(d_output),
        grad_turn=_rows(d_turn),
        grad_aim=_rows(d_aim),
        grad_tangent=None if tangent is None else _rows(d_tangent),
    )
    attention.over_queries(attention_moments_backward_rows)
    attention.over_keys(attention_moments_backward_columns, key.shape[1])
    if grad_mean is None:
        d_turn.zero_()
    else:
        attention.over_keys(attention_moments_backward_turns, query.shape[1])
    return grads


def empty_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    angle: Tensor,
    turn: Tensor,
    aim: Tensor,
    tangent: Tensor | None,
    *more: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of the backward pass, unwritten, in the order of their tensors' dimensions in memory."""
    d_query, d_key, d_value, d_output, d_turn, d_aim = (
        torch.empty_like(_dense(tensor)) for tensor in (query, key, value, output, turn, aim)
    )
    d_tangent = query.new_empty(0) if tangent is None else torch.empty_like(_dense(tangent))
    return d_query, d_key, d_value, d_output, d_turn, d_aim, d_tangent


class _Attention:
    """What the kernels are told about an attention, by the names of their arguments; each takes what it names.

    Operands are rounded to the stream's dtype here, once, rather than by every program that reads them.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        angle: Tensor,
        turn: Tensor,
        aim: Tensor,
        tangent: Tensor | None,
        mask: Tensor | None,
        scale: float,
        causal: bool,
        window: int | None,
    ) -> None:
        self._like = query
        (self._sequences, self._heads, self._rows, width), (shared, self._columns) = query.shape, key.shape[1:3]
        widths = {"HEAD": width, "VALUE": value.shape[-1], "TURN": angle.shape[-1]}
        self._widest = max(widths.values())
        operands = {"query": query, "key": key, "value": value, "turn": turn, "aim": aim, "tangent": tangent}
        spread = _spread(mask, (self._sequences, self._heads, self._rows, self._columns))
        strides = (0, 0, 0, 0) if spread is None else spread.stride()
        self._arguments: dict[str, Any] = {
            **{name: _rows(None if tensor is None else tensor.to(query.dtype)) for name, tensor in operands.items()},
            "output": _rows(output),
            # Minus the form that enters the mean is then one sum of products, in one accumulator.
            "reverse": _angles(-angle.to(query.dtype)),
            "mask": spread,
            **{
                f"mask_{name}": stride
                for name, stride in zip(("sequence", "head", "query", "key"), strides, strict=True)
            },
            "rows": self._rows,
            "columns": self._columns,
            "heads": self._heads,
            "groups": self._heads // shared,
            # A window that holds every key is none, and fits into 32 bits.
            "window": None if window is None else min(window, self._rows + self._columns),
            "scale": scale,
        }
        self._constants = {
            "CAUSAL": causal,
            "ADDITIVE": mask is not None and mask.dtype != torch.bool,
            "PER_QUERY": strides[2] != 0,
            "EMULATED": query.device.type == "cpu" and query.dtype == torch.bfloat16,
            **widths,
            **{f"{name}_TILE": launch.tile_width(width) for name, width in widths.items()},
        }

    def add(self, **arguments: Group | Tensor | None) -> None:
        """More arguments."""
        self._arguments |= arguments

    def over_queries(self, kernel: Any) -> None:
        """Launch one program per block of queries and head."""
        config = self._configuration(kernel)
        self._run(kernel, config, -(-self._rows // config.block_rows) * self._heads)

    def over_keys(self, kernel: Any, heads: int) -> None:
        """Launch one program per block of keys and each of `heads` heads."""
        config = self._configuration(kernel)
        self._run(kernel, config, -(-self._columns // config.block_columns) * heads)

    def _configuration(self, kernel: Any) -> launch.AttentionLaunch:
        return launch.configure_attention(
            kernel.fn.__name__,
            self._widest,
            self._like.element_size(),
            target(self._like),
        )

    def _run(self, kernel: Any, config: launch.AttentionLaunch, programs: int) -> None:
        if self._sequences * programs == 0:
            return
        constants = self._constants | {"BLOCK_ROWS": config.block_rows, "BLOCK_COLUMNS": config.block_columns}
        given = {name: value for name, value in constants.items() if name in kernel.arg_names}
        args = tuple(self._arguments[name] for name in kernel.arg_names if name in self._arguments)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        start(kernel, self._sequences * programs, self._like, args, given, config.max_registers, **options)


def _rows(tensor: Tensor | None) -> Group | None:
    """(B, heads, rows, channels) with dense channels."""
    if tensor is None:
        return None
    tensor = _dense(tensor)
    return tensor, *tensor.stride()[:3]


def _angles(angle: Tensor) -> Group:
    """(B or 1, rows, channels): the same for all heads, and for all sequences if there is one."""
    angle = _dense(angle)
    return angle, angle.stride(0) if angle.shape[0] > 1 else 0, 0, angle.stride(1)


def _spread(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """The mask as (B, heads, rows, columns), with stride 0 where it has only one of them."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        # Bytes: a boolean is one bit to a compiler.
        mask = mask.view(torch.uint8)
    elif mask.dtype == torch.float64:
        mask = mask.float()
    return mask.expand(shape)


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.causal, ctx.window = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[0])


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    query, key, value, output, turn, aim, tangent = call_backward(*saved, *grads, ctx.scale, ctx.causal, ctx.window)
    tangent = None if saved[7] is None else tangent
    return query, key, value, output, None, turn, aim, tangent, None, None, None, None


call_backward = operation("attention_moments_backward", backward, empty_gradients)
call = operation("attention_moments", forward, empty, Derivative(_save, _differentiate))
