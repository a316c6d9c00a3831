"""Many adapters of one base in memory, and batches whose rows belong to different ones: a scale per row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ofa import sharding
from ofa.adapters.read import Adapter, read_adapter, refuse_head
from ofa.adapters.same_base import Base
from ofa.adapters.save_and_load import check_fit
from ofa.errors import InputError
from ofa.tuning.norms import base_parameters

_ONE_SCALE_FOR_ALL = (nn.LayerNorm, nn.RMSNorm)
"""Modules of PyTorch, whose kernels take one scale; the norms of transformers multiply, by one for each row too."""


class AdapterPool:
    """Adapters of one model by name, any of which may answer any row of a batch.

    Inside `rows`, each row of a batch is computed with the scales of its adapter, as if `load_adapter` had loaded that
    adapter alone. Outside, the model is the base. Several threads may use a pool; each chooses its own rows.

    Raises:
        InputError: the model is sharded, has no norms with a scale, or is in a pool already.

    Example:
        >>> for name in ("reviews", "tickets"):
        ...     path = ofa.save_adapter(model, folder / name)
        >>> pool = ofa.AdapterPool(model)
        >>> pool.add("reviews", folder / "reviews")
        >>> pool.add("tickets", folder / "tickets")
        >>> with pool.rows(["tickets", "reviews"]):
        ...     logits = model(**batch).logits
        >>> pool.remove("reviews")
        >>> pool.names
        ('tickets',)
        >>> pool.close()
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = sharding.unwrapped(model)
        if sharding.is_sharded(self.model):
            raise InputError("the norms of a sharded model are in parts; make the pool of a model that is whole")
        parameters = base_parameters(self.model)
        self._adapters: dict[str, Tensor] = {}
        self._rows: ContextVar[Tensor | None] = ContextVar("rows", default=None)
        self._norms = _norms(self.model, parameters, self._rows)
        if any("forward" in vars(norm.module) for norm in self._norms):
            raise InputError(
                "the model is in a pool already, or other code has exchanged the forward pass of its norms; close that "
                "pool, or load the model again without a device map"
            )
        self._base = Base.of(self.model)  # once: hundreds of adapters are checked against it
        for norm in self._norms:
            norm.module.forward = norm

    def add(self, name: str, adapter: str | Path | Adapter) -> None:
        """Read an adapter folder; one of this name is replaced.

        Raises:
            InputError: the folder cannot be read, or belongs to another base.
        """
        read = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
        refuse_head(read, "a pool")
        check_fit(self.model, read, self._base)
        like: Any = self._norms[0].module.weight
        scales = {**self._base.parameters, **read.parameters}
        values = [scales[path].to(like.device, _wide(like)) for path in self._base.parameters]
        self._adapters[name] = torch.cat(values)

    def remove(self, name: str) -> None:
        """Forget an adapter; rows that were chosen before keep it.

        Raises:
            InputError: there is none of this name.
        """
        if self._adapters.pop(name, None) is None:
            raise self._unknown(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order in which they came."""
        return tuple(self._adapters)

    @contextmanager
    def rows(self, names: Sequence[str]) -> Iterator[None]:
        """Let row i of every batch that the model computes inside be answered by the adapter `names[i]`.

        Raises:
            InputError: there is no such adapter; a batch inside has another number of rows.
        """
        for name in names:
            if name not in self._adapters:
                raise self._unknown(name)
        if not names:
            raise InputError("no adapter was named; give the name of one for each row of the batch")
        chosen = torch.stack([self._adapters[name] for name in names])
        before = self._rows.set(chosen)
        try:
            yield
        finally:
            self._rows.reset(before)

    def close(self) -> None:
        """Give the model back as it was, and forget the adapters."""
        for norm in self._norms:
            vars(norm.module).pop("forward", None)
        self._norms, self._adapters = [], {}

    def __enter__(self) -> AdapterPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _unknown(self, name: str) -> InputError:
        known = ", ".join(self.names[:10]) or "none so far"
        return InputError(f"there is no adapter {name!r} in the pool; it holds {known}: add it first")


@dataclass(frozen=True)
class _Norm:
    """A norm's forward pass with the scales of the chosen rows, or its own where none are chosen."""

    module: nn.Module
    places: Mapping[str, slice]
    """Of its weight and bias in an adapter's vector."""
    rows: ContextVar[Tensor | None]

    def __call__(self, hidden: Tensor, *others: object, **named: object) -> Tensor:
        chosen = self.rows.get()
        if chosen is None:
            return type(self.module).forward(self.module, hidden, *others, **named)
        if hidden.dim() == 2 and len(hidden) % len(chosen) == 0:  # OPT's MLP reads the tokens of all rows in one list
            return self(hidden.unflatten(0, (len(chosen), -1)), *others, **named).flatten(0, 1)
        if len(hidden) != len(chosen):
            raise InputError(
                f"the batch has {len(hidden)} rows and {len(chosen)} adapters were named; name one for each row"
            )
        shape = (len(chosen), *[1] * (hidden.dim() - 2), -1)
        values = {name: chosen[:, place].view(shape).to(hidden.device) for name, place in self.places.items()}
        if self.module.weight.dtype == _wide(self.module.weight):
            return self._scaled(hidden, values, others, named)
        return self._scaled(hidden.to(_wide(self.module.weight)), values, others, named).to(hidden.dtype)

    def _scaled(
        self, hidden: Tensor, values: dict[str, Tensor], others: tuple[object, ...], named: dict[str, object]
    ) -> Tensor:
        if not isinstance(self.module, _ONE_SCALE_FOR_ALL):
            return self._own(values, hidden, *others, **named)
        normalized = self._own(dict.fromkeys(values), hidden)
        weight, bias = values["weight"], values.get("bias")
        return normalized * weight if bias is None else torch.addcmul(bias, normalized, weight)

    def _own(self, values: Mapping[str, Tensor | None], hidden: Tensor, *others: object, **named: object) -> Tensor:
        """The module's own forward pass with these parameters, which other threads do not see."""
        stand_in = object.__new__(type(self.module))
        vars(stand_in).update(vars(self.module), _parameters={**self.module._parameters, **values})
        return type(self.module).forward(stand_in, hidden, *others, **named)


def _wide(weight: Any) -> torch.dtype:
    """The precision of a tuned scale, as `tune_norms` has it."""
    return torch.promote_types(weight.dtype, torch.float32)


def _norms(model: nn.Module, base: Mapping[str, Tensor], rows: ContextVar[Tensor | None]) -> list[_Norm]:
    places: dict[str, dict[str, slice]] = {}
    start = 0
    for path, value in base.items():
        norm, _, name = path.rpartition(".")
        places.setdefault(norm, {})[name] = slice(start, start + value.numel())
        start += value.numel()
    return [_Norm(model.get_submodule(path), own, rows) for path, own in places.items()]
