"""Something costly that all workers of pytest-xdist share; a fixture of the session runs in each of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(request: pytest.FixtureRequest, name: str, make: Callable[[Path], None]) -> Path:
    """The folder of this name, filled by the first worker that asks; the others wait for it."""
    root = request.getfixturevalue("tmp_path_factory").getbasetemp()
    root = root.parent if hasattr(request.config, "workerinput") else root
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
