"""What commands make of errors, apart from any command."""

from __future__ import annotations

import pytest

from ofa.commands.console import was_interrupted


def test_an_interrupt_is_found_behind_what_it_became() -> None:
    """A library that is interrupted in the middle may raise an error of its own, in whose wake Ctrl-C would be lost."""
    broken = RuntimeError("broken")
    assert not was_interrupted(broken)
    broken.__context__ = KeyboardInterrupt()
    assert was_interrupted(broken)


@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_it_may_be_far_behind(link: str) -> None:
    """However it is chained."""
    first, second, third = KeyboardInterrupt(), ValueError(), RuntimeError()
    setattr(second, link, first)
    setattr(third, link, second)
    assert was_interrupted(first)
    assert was_interrupted(third)
