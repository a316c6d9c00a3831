"""Fix the options of a method that is a special case of another method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ofa.errors import InputError


def special_case(method: str, options: Mapping[str, Any], *, term: str | None = None, **fixed: Any) -> dict[str, Any]:
    """`options` together with the fixed options of `method`.

    Args:
        term: the regularizer that the method must keep.
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
    return {**options, **fixed}
