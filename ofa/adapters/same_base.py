"""Refuse an adapter of another base, and warn of one whose frozen weights differ."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ofa.adapters.base_norms import fingerprints
from ofa.adapters.base_weights import difference, weight_digests
from ofa.adapters.read import Adapter
from ofa.errors import InputError
from ofa.models.introspection import source_of
from ofa.tuning.norms import base_parameters

_warned: weakref.WeakKeyDictionary[nn.Module, set[Path]] = weakref.WeakKeyDictionary()
"""Adapters, by model, for which a warning about another base was logged."""

logger = logging.getLogger(__name__)


def base_name(model: nn.Module) -> str | None:
    """The name that a model was loaded by."""
    return getattr(getattr(model, "config", None), "name_or_path", "") or None


def base_facts(model: nn.Module) -> dict[str, str | None]:
    """Entries of `ofa_config.json` that name the base, and where it was loaded from: copies of a hub id may differ."""
    source = source_of(model)
    return {"base_model": base_name(model), **({"base_source": source} if source else {})}


@dataclass(frozen=True)
class Base:
    """What adapters are checked against: a model's own scales and shifts, and digests of them and of other weights."""

    parameters: Mapping[str, Tensor]
    norms: Mapping[str, str]
    weights: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Base:
        """Read every norm, and a sample of each weight."""
        return cls(base_parameters(model), fingerprints(model), weight_digests(model))


def check_base(model: nn.Module, adapter: Adapter, base: Base | None = None) -> None:
    """Compare a model with the base that the adapter's details describe; warn once of other frozen weights.

    `base` is the model's, if it is known.

    Raises:
        InputError: the model's own norms differ.
    """
    name = adapter.base or "another model"
    known = base or Base.of(model)
    actual = known.norms
    expected = {adapter.details[name] for name in actual if name in adapter.details}
    if expected and expected.isdisjoint(actual.values()):
        raise InputError(
            f"{adapter.folder} was made for {name}, and this model's own norms differ; load that base instead"
        )
    warned = _warned.setdefault(model, set())
    differing = difference(adapter.details.get("base_weights", {}), known.weights)
    if differing is not None and adapter.folder not in warned:
        warned.add(adapter.folder)
        logger.warning(
            "%s was made for %s: this model has the same norms but other weights (%s), so predictions may differ; load "
            "that base, or test this one with `ofa evaluate`",
            adapter.folder,
            name,
            differing,
        )
