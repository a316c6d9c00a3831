"""The constants of frozen weights on a GPU: schemas, shapes and launches; what they are is in `reference.constants`.

They are called where gradients are written by hand, so that they have no autograd of their own. The kernels take
weights in one floating dtype of at most 32 bits; others are copied first.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ofa_kernels import launch
from ofa_kernels.ops.launching import library, multiprocessors, operation, start, target
from ofa_kernels.reference.constants import check_attention_weights, check_gradients, check_mlp_weights

Matrix = tuple[Any, ...]
"""A tensor and its strides, as the kernels take them."""

ROW = 16
"""What a row's float32 numbers are a multiple of, so that the next one's are read and written 16 bytes at a time."""

_MLP = "Tensor gate, Tensor? up, Tensor down, Tensor scale"
_ATTENTION = "Tensor query, Tensor key, Tensor value, Tensor output, Tensor scale"
library.define(f"mlp_constants({_MLP}, bool centred) -> (Tensor gate_trace, Tensor up_trace)")
library.define(f"mlp_constants_gradient({_MLP}, Tensor grad_gate, Tensor? grad_up, bool centred) -> Tensor")
library.define(f"attention_constants({_ATTENTION}, bool centred) -> (Tensor to_query, Tensor to_key, Tensor to_value)")
library.define(
    f"attention_constants_gradient({_ATTENTION}, Tensor grad_query, Tensor grad_key, Tensor grad_value, bool centred) "
    "-> Tensor"
)


def mlp_constants(gate: Tensor, up: Tensor | None, down: Tensor, scale: Tensor, centred: bool) -> tuple[Tensor, ...]:
    """As `reference.mlp_constants`, in one read of every weight; float32.

    Raises:
        ValueError: shapes that do not match.
    """
    check_mlp_weights(gate, up, down, scale)
    of_gate, of_up = _call_mlp_constants(gate, up, down, scale, centred)
    return (of_gate,) if up is None else (of_gate, of_up)


def mlp_constants_gradient(
    gate: Tensor, up: Tensor | None, down: Tensor, scale: Tensor, grads: Sequence[Tensor], centred: bool
) -> Tensor:
    """As `reference.mlp_constants_gradient`, in one read of every weight, two if `centred`; float32.

    Raises:
        ValueError: shapes that do not match.
    """
    check_mlp_weights(gate, up, down, scale)
    check_gradients(grads, [gate.shape[:1]] * (1 if up is None else 2))
    of_up = None if up is None else grads[1]
    grad: Tensor = _call_mlp_constants_gradient(gate, up, down, scale, grads[0], of_up, centred)
    return grad


def attention_constants(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: Tensor, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.attention_constants`, in one read of every weight; float32.

    Products have their operands in the weights' dtype, W_o Γ² as the sum of two such numbers.

    Raises:
        ValueError: shapes that do not match.
    """
    check_attention_weights(query, key, value, output, scale)
    result: tuple[Tensor, Tensor, Tensor] = _call_attention_constants(query, key, value, output, scale, centred)
    return result


def attention_constants_gradient(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: Tensor, grads: Sequence[Tensor], centred: bool
) -> Tensor:
    """As `reference.attention_constants_gradient`, in one read of every weight, two if `centred`; float32.

    Raises:
        ValueError: shapes that do not match.
    """
    check_attention_weights(query, key, value, output, scale)
    heads, width = query.shape[:2]
    check_gradients(grads, [(heads, width, width), (heads, width, width), (heads,)])
    grad: Tensor = _call_attention_constants_gradient(query, key, value, output, scale, *grads, centred)
    return grad


def forward_mlp(gate: Tensor, up: Tensor | None, down: Tensor, scale: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel for an MLP, and add up what its programs found."""
    found = list(_mlp_sums(gate, up, down, scale, centred).unbind())
    constants = [found.pop(0) for _ in range(1 if up is None else 2)]
    if centred:
        *along, beside = found
        constants = [own - a * beside / len(scale) for own, a in zip(constants, along, strict=True)]
    return constants[0], scale.new_empty(0, dtype=torch.float32) if up is None else constants[1]


def empty_mlp(gate: Tensor, up: Tensor | None, down: Tensor, scale: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """The constants of an MLP, unwritten; those of a missing `up` are empty."""
    inner = gate.shape[0]
    of_gate = scale.new_empty(inner, dtype=torch.float32)
    return of_gate, scale.new_empty(0 if up is None else inner, dtype=torch.float32)


def backward_mlp(
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    scale: Tensor,
    grad_gate: Tensor,
    grad_up: Tensor | None,
    centred: bool,
) -> Tensor:
    """Launch the backward kernel for an MLP, and add up what its programs found."""
    from ofa_kernels.kernels.constants import mlp_constants_backward

    (inner, width), (gate, up, down) = gate.shape, _alike(gate, up, down)
    grads = [grad.float().contiguous() for grad in (grad_gate, grad_up) if grad is not None]
    along = beside = None
    if centred:
        *both, beside = _mlp_sums(gate, up, down, scale, centred)[len(grads) :].unbind()
        along = sum(own * grad for own, grad in zip(both, grads, strict=True))
    config = _configuration(mlp_constants_backward, width, gate)
    blocks, tiles = -(-width // config.block_width), -(-inner // config.block_rows)
    shares = launch.shares(blocks, tiles, config.waves * multiprocessors(gate.device))
    sums = scale.new_empty((shares, width), dtype=torch.float32)
    args = _matrix(gate), _matrix(up), _matrix(down.mT), _vector(scale), grads[0], grads[1] if up is not None else None
    constants = {"CENTRED": centred, "BLOCK_INNER": config.block_rows, "BLOCK_WIDTH": config.block_width}
    _start(mlp_constants_backward, blocks * shares, gate, config, (*args, along, beside, sums, inner, width), constants)
    return sums.sum(0)


def empty_gradient(first: Tensor, second: Tensor | None, third: Tensor, *more: Any) -> Tensor:
    """The gradient in γ, unwritten; the norm's channels are the last dimension of the first weight."""
    return first.new_empty(first.shape[-1], dtype=torch.float32)


def forward_attention(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: Tensor, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel for an attention, and add up what its programs found."""
    (to_query, to_key), vectors, traces = _attention_sums(query, key, value, output, scale, centred, products=True)
    to_value = traces[0] if len(traces) == 1 else traces.sum(0)
    if centred:
        of_query, of_key, of_value, beside = vectors
        beside = beside / len(scale)
        to_query -= of_query.unsqueeze(2) * beside.unsqueeze(1)
        to_key -= of_key.unsqueeze(2) * beside.unsqueeze(1)
        to_value -= (of_value * beside).sum(1)
    return to_query, to_key, to_value


def empty_attention(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: Tensor, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The constants of an attention, unwritten."""
    heads, width = query.shape[:2]
    to_query, to_key = (scale.new_empty((heads, width, width), dtype=torch.float32) for _ in range(2))
    return to_query, to_key, scale.new_empty(heads, dtype=torch.float32)


def backward_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    scale: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    centred: bool,
) -> Tensor:
    """Launch the backward kernel for an attention, and add up what its heads found."""
    from ofa_kernels.kernels.constants import attention_constants_backward

    query, key, value, output = _alike(query, key, value, output)
    heads, head, width = query.shape
    grads = [grad.float().contiguous() for grad in (grad_query, grad_key, grad_value)]
    along = beside = None
    if centred:
        _, (of_query, of_key, of_value, beside), _ = _attention_sums(
            query, key, value, output, scale, centred, products=False
        )
        along = (of_query.unsqueeze(1) @ grads[0] + of_key.unsqueeze(1) @ grads[1]).squeeze(1)
        along += grads[2].unsqueeze(1) * of_value
    config = _configuration(attention_constants_backward, head, query)
    sums = scale.new_empty((heads, width), dtype=torch.float32)
    largest = torch.maximum(*(grad.abs().amax((1, 2)) for grad in grads[:2])) if _narrow(query) else None
    constants = {"CENTRED": centred, "HEAD_TILE": launch.tile_width(head), **_constants(query, config)}
    args = (
        *(_matrix(weight) for weight in (query, key, value, output)),
        _vector(scale),
        None if largest is None else _unit(largest),
        *grads,
        along,
        beside,
        sums,
        heads,
        heads // len(key),
        width,
    )
    blocks = -(-width // config.block_width)
    _start(attention_constants_backward, heads * blocks, query, config, args, constants)
    return sums.sum(0)


def _mlp_sums(gate: Tensor, up: Tensor | None, down: Tensor, scale: Tensor, centred: bool) -> Tensor:
    """What the forward kernel for an MLP sums, (1, 2, 3 or 5, f); see there."""
    from ofa_kernels.kernels.constants import mlp_constants_forward

    (inner, width), (gate, up, down) = gate.shape, _alike(gate, up, down)
    config = _configuration(mlp_constants_forward, width, gate)
    blocks, tiles = -(-inner // config.block_rows), -(-width // config.block_width)
    shares = launch.shares(blocks, tiles, config.waves * multiprocessors(gate.device))
    kinds = (1 if up is None else 2) * (2 if centred else 1) + (1 if centred else 0)
    sums = scale.new_empty((shares, kinds, inner), dtype=torch.float32)
    args = _matrix(gate), _matrix(up), _matrix(down.mT), _vector(scale), sums, inner, width
    constants = {"CENTRED": centred, "BLOCK_INNER": config.block_rows, "BLOCK_WIDTH": config.block_width}
    _start(mlp_constants_forward, blocks * shares, gate, config, args, constants)
    return sums.sum(0)


def _attention_sums(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: Tensor, centred: bool, *, products: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the forward kernel for an attention sums: products, vectors and traces; see there. Empty if not wanted."""
    from ofa_kernels.kernels.constants import attention_constants_forward

    query, key, value, output = _alike(query, key, value, output)
    heads, head, width = query.shape
    config = _configuration(attention_constants_forward, head, query)
    blocks, tiles = (-(-head // config.block_rows)) ** 2, -(-width // config.block_width)
    shares = launch.shares(heads * blocks, tiles, config.waves * multiprocessors(query.device))
    shapes = (2 * products, heads, head, head), (4 * centred, heads, head), (blocks * products, heads)
    sizes = [prod(shape) for shape in shapes]
    # Rows that begin at 16 bytes; what is between them nobody reads.
    share = -(-sum(sizes) // ROW) * ROW
    sums = scale.new_empty((shares, share), dtype=torch.float32)
    args = (
        *(_matrix(weight) for weight in (query, key, value, output)),
        _vector(scale),
        _unit(scale.float().square().amax()) if products and _narrow(query) else None,
        sums,
        share,
        heads,
        heads // len(key),
        width,
    )
    constants = {"CENTRED": centred, "PRODUCTS": products, **_constants(query, config)}
    _start(attention_constants_forward, heads * blocks * shares, query, config, args, constants)
    parts = sums.sum(0).split([*sizes, share - sum(sizes)])
    found, vectors, traces = (part.view(shape) for part, shape in zip(parts, shapes, strict=False))
    return found, vectors, traces


def _alike(*weights: Tensor | None) -> Any:
    """The weights in one dtype that the kernels take; copies where they are not."""
    given = [weight for weight in weights if weight is not None]
    dtype = given[0].dtype
    if any(weight.dtype != dtype for weight in given):
        dtype = torch.float32
    return tuple(None if weight is None else weight.to(dtype) for weight in weights)


def _narrow(weight: Tensor) -> bool:
    """Whether numbers of a weight's dtype are so few that factors have to be brought into their range."""
    return weight.dtype == torch.float16


def _unit(largest: Tensor) -> Tensor:
    """The power of two that brings `largest`, no negative numbers, to 2⁷…2⁸.

    Numbers 2²⁰ times smaller are then still normal ones of float16 or a rounding of the largest, and products with
    weights up to 2⁸ are none that it does not have.
    """
    exponent = 8 - torch.frexp(largest).exponent
    return torch.ldexp(torch.ones_like(largest), exponent.clamp(max=100))


def _matrix(weight: Tensor | None) -> Matrix | None:
    return None if weight is None else (weight, *weight.stride())


def _vector(scale: Tensor) -> Tensor:
    return scale.float().contiguous()


def _configuration(kernel: Any, width: int, tensor: Tensor) -> launch.ConstantsLaunch:
    return launch.configure_constants(kernel.fn.__name__, width, tensor.element_size(), target(tensor))


def _constants(query: Tensor, config: launch.ConstantsLaunch) -> dict[str, Any]:
    """What both kernels for an attention are compiled for."""
    return {
        "EMULATED": query.device.type == "cpu" and query.dtype == torch.bfloat16,
        "HEAD": query.shape[1],
        "BLOCK_HEAD": config.block_rows,
        "BLOCK_WIDTH": config.block_width,
    }


def _start(
    kernel: Any,
    grid: int,
    tensor: Tensor,
    config: launch.ConstantsLaunch,
    args: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    start(kernel, grid, tensor, args, constants, config.max_registers, **options)


_call_mlp_constants = operation("mlp_constants", forward_mlp, empty_mlp)
_call_mlp_constants_gradient = operation("mlp_constants_gradient", backward_mlp, empty_gradient)
_call_attention_constants = operation("attention_constants", forward_attention, empty_attention)
_call_attention_constants_gradient = operation("attention_constants_gradient", backward_attention, empty_gradient)
