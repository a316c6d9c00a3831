"""`scripts/check-versions` installs the versions that the metadata promises."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "check-versions"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT), run_name="script")


def test_both_ends_are_stated(script: dict[str, Any]) -> None:
    """Each of the four libraries has an oldest and a newest version in the metadata, so that both can be installed."""
    assert set(script["_bounds"]()) == set(script["LIBRARIES"])
    assert all(">=" in bound and "<" in bound for bound in script["_bounds"]().values())


def test_the_oldest_are_the_lower_bounds(script: dict[str, Any]) -> None:
    """pip must not choose anything newer than the promised versions."""
    oldest = dict(item.split("==") for item in script["_requirements"]("oldest") if "==" in item)
    assert {name: f">={version.removesuffix('.*')}" for name, version in oldest.items()} == {
        name: bound.split(",")[0] for name, bound in script["_bounds"]().items()
    }


def test_every_group_of_tests_exists(script: dict[str, Any]) -> None:
    """A renamed file would otherwise fail only after the environments have been built."""
    assert [name for name in script["TESTS"] if not (SCRIPT.parent.parent / name).exists()] == []


def test_an_unknown_set_is_refused_in_a_sentence() -> None:
    """Before anything is installed."""
    done = subprocess.run([sys.executable, SCRIPT, "latest"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no set 'latest'; choose from oldest, pinned, newest" in done.stderr
