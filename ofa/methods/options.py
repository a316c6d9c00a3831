"""Fix the options of a method that is a special case of another method."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ofa.errors import InputError
from ofa.regularizers.options import RegularizerOptions


def without_regularizers(method: str, options: Mapping[str, object]) -> dict[str, object]:
    """`options` with both regularizers off.

    Raises:
        InputError: the options have a setting of the regularizers other than a weight of 0.
    """
    off = {"step_ratio": 0.0, "sharpness": 0.0}
    foreign = options.keys() & (RegularizerOptions.model_fields.keys() - {"seed"})
    foreign -= {name for name in off if options.get(name) == 0}
    if foreign:
        raise InputError(f"{min(foreign)} is a setting of OFA, and {method} has no regularizers; leave it out")
    return {**options, **off}


def special_case(
    method: str,
    options: Mapping[str, object],
    *,
    term: str | None = None,
    defaults: Mapping[str, object] = MappingProxyType({}),
    **fixed: object,
) -> dict[str, Any]:
    """`options` together with the fixed options of `method`.

    Args:
        term: the regularizer that the method must keep.
        defaults: options that the method has where they are not given.
        fixed: the options whose value defines the method.

    Raises:
        InputError: an option contradicts the method.
    """
    for name, value in fixed.items():
        if options.get(name, value) != value:
            raise InputError(
                f"{method} means {name}={value}, not {options[name]!r}; leave {name} out or choose another method"
            )
    if term is not None and options.get(term) == 0:
        raise InputError(f"{method} with {term}=0 is norm tuning; give a weight above 0, or choose norm-tuning")
    return {**defaults, **options, **fixed}
