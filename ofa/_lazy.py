"""Public names of a package that are imported on first use, so that importing the package imports no library."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def on_first_use(
    package: str, exports: Mapping[str, str]
) -> tuple[list[str], Callable[[str], object], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` of a package, from the public names of its modules (space-separated)."""
    modules = {name: module for module, names in exports.items() for name in names.split()}

    def get(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(modules[name]), name)
        vars(sys.modules[package])[name] = value
        return value

    return list(modules), get, lambda: sorted({*vars(sys.modules[package]), *modules})
