"""Triton's interpreter, which wraps the whole language again in every call of a device function: 40 % of it."""

from __future__ import annotations

from typing import Any


class _Nothing:
    def restore(self) -> None:
        pass


def wrap_language_once_per_launch() -> None:
    """Wrap it at the launch and leave it alone until that ends; a Triton that does it another way stays as it is."""
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    wrap, wrapped = interpreter._patch_lang, set()

    def once(function: Any) -> Any:
        modules = {id(seen) for seen in function.__globals__.values() if seen is language or seen is language.core}
        if modules <= wrapped:
            return _Nothing()
        scope = wrap(function)
        wrapped.update(modules)
        restore = scope.restore

        def end() -> None:
            wrapped.clear()
            restore()

        scope.restore = end
        return scope

    interpreter._patch_lang = once
