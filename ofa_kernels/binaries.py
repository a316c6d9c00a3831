"""Precompiled kernels of an installation, copied into Triton's cache so that the first call need not compile.

They are stored as `<triton version>/<architecture>/<key>/<file>`. The key is Triton's cache key, a hash of source,
compiler, target and launch options, so a stale binary is never used: Triton compiles instead.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "binaries"
"""The binaries of this installation; a pure-Python one has no such folder."""


@dataclass(frozen=True)
class Entry:
    """One compiled kernel: the key, and its binary and metadata by file name."""

    key: str
    files: tuple[tuple[str, bytes], ...]


def entry(compiled: Any) -> Entry:
    """The files of a compiled kernel that a launch needs: binary and metadata, not the intermediate stages."""
    key = base64.b32encode(bytes.fromhex(compiled.hash)).decode().rstrip("=")
    wanted = (".json", ".cubin", ".hsaco")
    files = {name: Path(path).read_bytes() for name, path in compiled.metadata_group.items() if name.endswith(wanted)}
    return Entry(key, tuple(sorted(files.items())))


def write(folder: Path, entries: Iterable[tuple[str, Entry]]) -> None:
    """Write entries, each with its architecture, under the installed Triton version."""
    from triton import __version__

    for architecture, one in entries:
        into = folder / __version__ / architecture / one.key
        into.mkdir(parents=True, exist_ok=True)
        for name, data in one.files:
            (into / name).write_bytes(data)


@cache
def offer(architecture: str, folder: Path = FOLDER) -> int:
    """Copy the binaries for this Triton and architecture into Triton's cache; returns how many were new.

    If the cache cannot be written, this logs a warning, and Triton reports the fault when it compiles.
    """
    from triton import __version__

    entries = folder / __version__ / architecture
    if not entries.is_dir():
        return 0
    try:
        return sum(_offer_one(one) for one in sorted(entries.iterdir()))
    except OSError as error:
        _logger.warning("the compiled kernels of this installation cannot be used: %s", error)
        return 0


def _offer_one(folder: Path) -> bool:
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    manager = (knobs.cache.manager_class or FileCacheManager)(folder.name)
    files = sorted(folder.iterdir())
    metadata = next(file.name for file in files if file.suffix == ".json")
    if manager.get_group(metadata):
        return False
    group = {file.name: manager.put(file.read_bytes(), file.name) for file in files}
    manager.put_group(metadata, group)
    return True
