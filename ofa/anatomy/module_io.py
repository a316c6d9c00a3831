"""Read and replace the hidden states among a module's arguments and outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def hidden_input(args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
    """The hidden states a module is called with: its `hidden_states` argument, or its first tensor."""
    named = kwargs.get("hidden_states")
    if isinstance(named, Tensor):
        return named
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def replace_tensors(
    args: tuple[object, ...], kwargs: dict[str, object], change: Callable[[str, Tensor], Tensor]
) -> Arguments:
    """Arguments with `change(name, tensor)` applied to every tensor, also inside tuples; positional names are ""."""
    return (
        tuple(_changed("", value, change) for value in args),
        {name: _changed(name, value, change) for name, value in kwargs.items()},
    )


def repeat_batch(name: str, tensor: Tensor, batch: int, copies: int) -> Tensor:
    """A module's argument for `copies` copies of its batch; unchanged if it broadcasts over the batch."""
    # Falcon's alibi is (batch · heads, …); other tensors begin with the batch or broadcast over it.
    batched = name == "alibi" or (tensor.dim() >= 2 and tensor.shape[0] == batch)
    return tensor.repeat(copies, *[1] * (tensor.dim() - 1)) if batched else tensor


def hidden_output(output: Any) -> Tensor:
    """The hidden states a module returns: the tensor itself, or the first item of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def replace_hidden_output(output: Any, hidden: Tensor, change_other: Callable[[Tensor], Tensor]) -> object:
    """The output with other hidden states; `change_other` is applied to the tensors that accompany them."""
    if isinstance(output, Tensor):
        return hidden
    rest = (change_other(item) if isinstance(item, Tensor) else item for item in output[1:])
    return (hidden, *rest)


def _changed(name: str, value: object, change: Callable[[str, Tensor], Tensor]) -> object:
    # Not a closure in `replace_tensors`: a recursive closure is a reference cycle, and keeps tensors and their graph
    # alive until the garbage collector runs.
    if isinstance(value, Tensor):
        return change(name, value)
    return tuple(_changed(name, item, change) for item in value) if type(value) is tuple else value
