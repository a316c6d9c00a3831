"""A CUDA graph without a GPU: records the operations of a computation, and repeats them on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ofa.training.capture import CannotCaptureError

WAITING = ("equal", "_local_scalar_dense", "is_nonzero", "item", "nonzero", "allclose", "unique", "masked_select")
"""Operations that read values, or whose shapes depend on them: on a GPU they wait for the device."""


class Recorder:
    """Stands for `Capture`: as there, nothing of Python runs in a replay, and a recording changes no tensor."""

    def __init__(self) -> None:
        self.recorded = 0

    def rehearse(self, run: Callable[[], None]) -> None:
        """Run once, refusing what reads values."""
        with _Refusing():
            run()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record the operations, and put back what they wrote into."""
        tape = _Tape()
        with tape:
            run()
        with torch.no_grad():
            for tensor, before in reversed(tape.overwritten):
                tensor.copy_(before)
        self.recorded += 1
        return tape.replay


class _Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITING:
            raise CannotCaptureError(f"{func.overloadpacket.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.overwritten: list[tuple[Tensor, Tensor]] = []
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._own: set[int] = set()
        """Storages made in the recording, which its calls keep alive."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in [*zip(func._schema.arguments, args, strict=False), *_named(func, kwargs)]:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.overwritten += [(t.detach(), t.detach().clone()) for t in _tensors(value) if not self._is_own(t)]
        # As they are now: `squeeze_` and the like change a tensor's shape in place.
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        result = func(*args, **kwargs)
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        self._own.update(_storage(tensor) for tensor in _tensors(result) if _storage(tensor) not in given)
        self._calls.append((func, args, kwargs, tree_map_only(Tensor, Tensor.detach, result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat every operation, into the tensors that it made when it was recorded."""
        for func, args, kwargs, result in self._calls:
            given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
            for made, again in zip(_tensors(result), _tensors(func(*args, **kwargs)), strict=True):
                if _storage(made) not in given:  # else a view of an argument, or the argument itself
                    made.copy_(again)

    def _is_own(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._own


def _named(func: Any, kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(one, kwargs[one.name]) for one in func._schema.arguments if one.name in kwargs]


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
