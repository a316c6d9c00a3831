"""`attention_moments` on a GPU: schema, shapes, autograd and launches; see `reference.attention_moments`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofa_kernels import launch
from ofa_kernels.ops.launching import Derivative, library, operation, start_by_names, target
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
    outputs = empty(query, key, value, output, angle, turn, aim, tangent, mask)
    lse, mean, covariance = outputs
    reverse = -angle.to(query.dtype)
    sweep = Attention(query, key, value, output, reverse, turn, aim, tangent, mask, scale, causal, window)
    sweep.forward(lse, mean, covariance)
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
    reverse = -angle.to(query.dtype)
    sweep = Attention(query, key, value, output, reverse, turn, aim, tangent, mask, scale, causal, window)
    grads = sweep.backward(lse, grad_lse, grad_mean, grad_covariance)
    return (
        grads["query"],
        sum_of_groups(grads["key"], key),
        sum_of_groups(grads["value"], value),
        grads["output"],
        grads["turn"],
        grads["aim"],
        query.new_empty(0) if tangent is None else grads["tangent"],
    )


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
        like(tensor) for tensor in (query, key, value, output, turn, aim)
    )
    d_tangent = query.new_empty(0) if tangent is None else like(tangent)
    return d_query, d_key, d_value, d_output, d_turn, d_aim, d_tangent


def sum_of_groups(each: Tensor, shared: Tensor) -> Tensor:
    """The gradient of keys or values from those of the query heads that they serve."""
    if each.shape[1] == shared.shape[1]:
        return each
    return like(shared).copy_(each.unflatten(1, (shared.shape[1], -1)).sum(2))


class Attention:
    """What the sweeps are told about an attention, by the names of their arguments; each takes what it names.

    Operands are rounded to the stream's dtype here, once, rather than by every program that reads them. `reverse` is
    −angle: minus the form that enters the mean is then one sum of products, in one accumulator.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        reverse: Tensor,
        turn: Tensor,
        aim: Tensor,
        tangent: Tensor | None,
        mask: Tensor | None,
        scale: float,
        causal: bool,
        window: int | None,
    ) -> None:
        self._like = query
        self._differentiated = {
            "query": query,
            "key": key,
            "value": value,
            "output": output,
            "turn": turn,
            "aim": aim,
            "tangent": tangent,
        }
        (self._sequences, self._heads, self._rows, width), (shared, self._columns) = query.shape, key.shape[1:3]
        widths = {"HEAD": width, "VALUE": value.shape[-1], "TURN": reverse.shape[-1]}
        self._widest = max(widths.values())
        operands = {"query": query, "key": key, "value": value, "turn": turn, "aim": aim, "tangent": tangent}
        given_mask = spread(mask, (self._sequences, self._heads, self._rows, self._columns))
        strides = (0, 0, 0, 0) if given_mask is None else given_mask.stride()
        self._arguments: dict[str, Any] = {
            **{name: None if x is None else rows_of(x.to(query.dtype)) for name, x in operands.items()},
            "output": rows_of(output),
            "reverse": angles_of(reverse),
            "mask": given_mask,
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
        self._constants: dict[str, Any] = {
            "CAUSAL": causal,
            "ADDITIVE": mask is not None and mask.dtype != torch.bool,
            "PER_QUERY": strides[2] != 0,
            "EMULATED": query.device.type == "cpu" and query.dtype == torch.bfloat16,
            **widths,
            **{f"{name}_TILE": launch.tile_width(width) for name, width in widths.items()},
        }

    def forward(self, lse: Tensor, mean: Tensor, covariance: Tensor) -> None:
        """Launch the sweep over the keys of every query, which writes to all three."""
        from ofa_kernels.kernels.attention_moments import attention_moments_forward

        self._arguments |= {"lse": lse, "mean": mean, "covariance": rows_of(covariance)}
        self._over_queries(attention_moments_forward)

    def backward(
        self,
        lse: Tensor,
        grad_lse: Tensor | None,
        grad_mean: Tensor | None,
        grad_covariance: Tensor | None,
        own_query: Tensor | None = None,
        *,
        tangent_follows: bool = False,
    ) -> dict[str, Tensor]:
        """Launch the sweeps backward: gradients by name, those of key and value with a head for each query head.

        One program for all the query heads of a key would be too few programs, and each too long, where eight share
        one; their gradients are float32 where they are to be summed. Gradients lie in memory as their tensors do.
        `own_query`, shaped like query, is added to its gradient, and written to. If `tangent_follows`, a tangent moves
        as the queries do: its gradient is part of theirs.
        """
        from ofa_kernels.kernels.attention_moments_backward import (
            attention_moments_backward_keys,
            attention_moments_backward_rows,
            attention_moments_backward_values,
        )

        apart = {name: x for name, x in self._differentiated.items() if not (tangent_follows and name == "tangent")}
        grads = {name: like(tensor) for name, tensor in apart.items() if tensor is not None}
        grads["query"] = grads["query"] if own_query is None else own_query
        for name in ("key", "value"):
            shared = grads[name]
            if shared.shape[1] != self._heads:
                shape = len(shared), self._heads, *shared.shape[2:]
                grads[name] = shared.new_empty(shape, dtype=torch.float32)
        pull, offset = (torch.empty_like(lse, memory_format=torch.contiguous_format) for _ in range(2))
        self._arguments |= {
            "lse": lse.contiguous(),
            "grad_lse": None if grad_lse is None else grad_lse.contiguous(),
            "grad_mean": None if grad_mean is None else grad_mean.contiguous(),
            "grad_covariance": None if grad_covariance is None else rows_of(grad_covariance.to(self._like.dtype)),
            "pull": pull,
            "offset": None if grad_covariance is None else offset,
            "grad_tangent": None,
            "own_query": None if own_query is None else rows_of(own_query),
            **{f"grad_{name}": rows_of(grad) for name, grad in grads.items()},
        }
        self._over_queries(attention_moments_backward_rows)
        self._over_keys(attention_moments_backward_keys)
        self._over_keys(attention_moments_backward_values)
        return grads

    def _over_queries(self, kernel: Any) -> None:
        """Launch one program per block of queries and head."""
        config = self._configuration(kernel)
        self._run(kernel, config, -(-self._rows // config.block_rows) * self._heads)

    def _over_keys(self, kernel: Any) -> None:
        """Launch one program per block of keys and query head."""
        config = self._configuration(kernel)
        self._run(kernel, config, -(-self._columns // config.block_columns) * self._heads)

    def _configuration(self, kernel: Any) -> launch.AttentionLaunch:
        return launch.configure_attention(
            kernel.fn.__name__,
            self._widest,
            self._like.element_size(),
            target(self._like),
            self._constants["PER_QUERY"] or self._arguments["tangent"] is not None,
        )

    def _run(self, kernel: Any, config: launch.AttentionLaunch, programs: int) -> None:
        programs *= self._sequences
        start_by_names(kernel, programs, self._like, config, self._arguments, self._constants)


def rows_of(tensor: Tensor) -> Group:
    """(B, heads, rows, channels) with dense channels."""
    tensor = _dense(tensor)
    return tensor, *tensor.stride()[:3]


def angles_of(angle: Tensor) -> Group:
    """(B or 1, rows, channels): the same for all heads, and for all sequences if there is one."""
    angle = _dense(angle)
    return angle, angle.stride(0) if angle.shape[0] > 1 else 0, 0, angle.stride(1)


def spread(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """The mask as (B, heads, rows, columns), with stride 0 where it has only one of them."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        # Bytes: a boolean is one bit to a compiler.
        mask = mask.view(torch.uint8)
    elif mask.dtype == torch.float64:
        mask = mask.float()
    return mask.expand(shape)


def like(tensor: Tensor) -> Tensor:
    """Room for a gradient, its dimensions in the order of the tensor's in memory."""
    return torch.empty_like(_dense(tensor))


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
