"""Writing that leaves either the old file or the new one, and output folders that are not written over by accident."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ofa.errors import InputError


def claim_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """The folder, made if need be, proven writable, and empty unless `overwrite`.

    Raises:
        InputError: it cannot be written, it is a file, or it holds something and `overwrite` is off.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        held = sorted(item.name for item in path.iterdir())
    except OSError as error:
        raise InputError(
            f"the output folder {path} cannot be written ({error.strerror}); choose another one"
        ) from error
    if held and not overwrite:
        raise InputError(
            f"the output folder {path} already holds {held[0]}{' and more' if len(held) > 1 else ''}; "
            "choose another one or pass --overwrite"
        )
    return path


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one move.

    Raises:
        InputError: the file cannot be written; whatever was at `path` is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); nothing there was changed") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, UTF-8."""
    write_atomically(path, lambda temporary: _flush(temporary, text))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _flush(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
