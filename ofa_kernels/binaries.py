"""Kernels that an installation brings along compiled, so that the first call need not compile them.

They are entries of Triton's own cache: `<triton version>/<architecture>/<key>/<file>`, the key being the hash under
which Triton looks for what it compiled. It covers the source, the compiler, the target and the launch options, so an
entry is used for exactly what it was compiled from; anything else is compiled as usual. Offering them puts them into
the user's Triton cache, by the cache manager that is in use.
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
"""Where an installation keeps them; there is none in a pure-Python one."""


@dataclass(frozen=True)
class Entry:
    """One compiled kernel: the key, and its binary and metadata by file name."""

    key: str
    files: tuple[tuple[str, bytes], ...]


def entry(compiled: Any) -> Entry:
    """What Triton needs of a compiled kernel to launch it: the binary and its metadata, not the stages between."""
    key = base64.b32encode(bytes.fromhex(compiled.hash)).decode().rstrip("=")
    wanted = (".json", ".cubin", ".hsaco")
    files = {name: Path(path).read_bytes() for name, path in compiled.metadata_group.items() if name.endswith(wanted)}
    return Entry(key, tuple(sorted(files.items())))


def write(folder: Path, entries: Iterable[tuple[str, Entry]]) -> None:
    """Write entries, each with its architecture, under the Triton version at hand."""
    from triton import __version__

    for architecture, one in entries:
        into = folder / __version__ / architecture / one.key
        into.mkdir(parents=True, exist_ok=True)
        for name, data in one.files:
            (into / name).write_bytes(data)


@cache
def offer(architecture: str, folder: Path = FOLDER) -> int:
    """Put what was built for this Triton and architecture into Triton's cache; returns how many were new to it.

    A cache that cannot be written is left to Triton, which compiles into it next and says what is wrong with it.
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
