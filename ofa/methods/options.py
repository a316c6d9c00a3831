"""Options of a method that is a special case of another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ofa.errors import InputError


def special_case(method: str, options: Mapping[str, Any], *, term: str | None = None, **fixed: Any) -> dict[str, Any]:
    """`options` together with those that make `method` what it is.

    Args:
        term: the regularizer that the method must keep.
        fixed: the options that have one value only here.

    Raises:
        InputError: an option contradicts.
    """
    for name, value in fixed.items():
        if options.get(name, value) != value:
            raise InputError(
                f"{method} means {name}={value}, not {options[name]!r}; leave {name} out or choose another method"
            )
    if term is not None and options.get(term) == 0:
        raise InputError(f"{method} with {term}=0 is norm tuning; give it a weight above 0 or choose norm-tuning")
    return {**options, **fixed}
