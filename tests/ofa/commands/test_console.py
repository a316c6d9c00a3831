"""Handling of errors that is common to all commands."""

from __future__ import annotations

import pytest

from ofa.commands import console
from ofa.commands.console import was_interrupted


def test_an_interrupt_is_found_as_the_cause_of_another_error() -> None:
    """An interrupted library may raise an error of its own, which would hide the Ctrl-C."""
    broken = RuntimeError("broken")
    assert not was_interrupted(broken)
    broken.__context__ = KeyboardInterrupt()
    assert was_interrupted(broken)


@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_an_interrupt_is_found_through_any_chain(link: str) -> None:
    """By __cause__ or __context__, at any depth."""
    first, second, third = KeyboardInterrupt(), ValueError(), RuntimeError()
    setattr(second, link, first)
    setattr(third, link, second)
    assert was_interrupted(first)
    assert was_interrupted(third)


def test_a_notice_goes_above_the_bar(monkeypatch, capsys):
    """Not after it on its line, where the next drawing would leave half of both."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    console._stderr.cache_clear()
    with console.progress_bar("comparing") as update:
        update(1, 2, "")
        console.notice("one is done")
    console._stderr.cache_clear()
    (line,) = (line for line in capsys.readouterr().err.split("\n") if "one is done" in line)
    assert "comparing" not in line.rpartition("\x1b[2K")[2]
