"""Writing that leaves either the old file or the new one, and output folders that one process at a time writes into."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout
from safetensors import SafetensorError

from ofa.errors import InputError

# What a full or read-only disk raises: safetensors wraps the system's error in its own.
WRITE_ERRORS = (OSError, SafetensorError)

LOCK = ".ofa.lock"
"""The file in an output folder that says that a process is writing there; gone when it is done."""

_owners: dict[Path, int] = {}
"""Folders that this process has to itself, and the thread that claimed each."""


def at_home(path: str | os.PathLike[str]) -> Path:
    """A path in which ~ is the home folder; a shell leaves it alone after = and in a file of options."""
    # Path.expanduser raises where there is no such user; a name that begins with ~ is a name.
    return Path(os.path.expanduser(path))


def claim_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """The folder, made if need be, proven writable, and empty unless `overwrite`.

    Raises:
        InputError: it cannot be written, it is a file, or it holds something and `overwrite` is off.
    """
    path = at_home(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        held = sorted(item.name for item in path.iterdir() if item.name != LOCK)
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


@contextmanager
def claimed_folder(folder: str | Path, *, overwrite: bool = False, shared: bool = False) -> Iterator[Path]:
    """`claim_folder` for the work inside, which no other process does in this folder meanwhile unless it is `shared`.

    If the work fails before it wrote anything, the folders made go again. Work inside may claim the folder again.

    Raises:
        InputError: see `claim_folder` and `sole_writer`.
    """
    path = at_home(folder)
    made = [place for place in (path, *path.parents) if not place.exists()]
    try:
        claim_folder(path, overwrite=True)
        ours = _owners.get(path.resolve()) == threading.get_ident()
        with nullcontext() if shared or ours else sole_writer(path):
            yield claim_folder(path, overwrite=overwrite)
    except BaseException:
        with suppress(OSError):  # not empty: the work wrote something
            for place in made:
                place.rmdir()
        raise


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """The right to write into a folder, for one process of any machine at a time.

    It is a lock of the file system, which the end of the process gives back, however it ends. NFS (version 4, or 3
    with lockd), SMB and Lustre mounted with `flock` lock between machines as a local disk does between processes. On a
    file system without locks the file itself says that a process is at work; one left by a killed process is taken
    over on the same machine, and named on others.

    Raises:
        InputError: another process is writing into the folder, or the lock cannot be made.
    """
    lock = _locked(folder)
    file, place = folder / LOCK, folder.resolve()
    _owners[place] = threading.get_ident()
    try:
        if isinstance(lock, FileLock):
            file.write_text(f"{os.getpid()}\n{platform.node()}\n")
        yield
    finally:
        del _owners[place]
        if isinstance(lock, FileLock):
            with suppress(OSError):  # while it is held, so that no other process locks a file that has lost its name
                file.unlink()
        lock.release()


def _locked(folder: Path) -> FileLock | SoftFileLock:
    file = folder / LOCK
    for kind in (FileLock, SoftFileLock):
        lock = kind(file)
        try:
            lock.acquire(timeout=0)
            while isinstance(lock, FileLock) and not file.exists():  # its last owner removed it as this one opened it
                lock.release()
                lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                f"another process{_owner(file)} is writing to {folder} at this moment; wait for its end, or choose "
                f"another output folder{'' if kind is FileLock else f' (delete {file} if that process is gone)'}"
            ) from error
        except OSError as error:  # of network file systems without a lock service
            failure = error
        else:
            return lock
    raise InputError(f"{file} cannot be locked ({reason(failure)}); choose another output folder") from failure


def _owner(lock: Path) -> str:
    """Which process has a lock, as its file says it."""
    try:
        number, machine = lock.read_text().split()[:2]
    except (OSError, ValueError):
        return ""
    return f" ({number} on {machine})"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one move.

    Raises:
        InputError: the file cannot be written; whatever was at `path` is still there.
    """
    write_together({path: write})


def write_together(files: Mapping[Path, Callable[[Path], None]]) -> None:
    """Fill a temporary file beside each path; when all of them are whole, move them into place in the order given.

    Raises:
        InputError: one of them cannot be written; what was at the paths is still there.
    """
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    path = next(iter(files))
    try:
        for path, write in files.items():
            write(temporaries[path])
            # safetensors makes its files readable for their owner alone; an adapter is there to be shared.
            temporaries[path].chmod(0o666 & ~_umask())
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except WRITE_ERRORS as error:
        raise InputError(f"{path} cannot be written ({reason(error)}); nothing there was changed") from error
    finally:
        for temporary in temporaries.values():
            with suppress(OSError):
                temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, UTF-8."""
    write_atomically(path, text_writer(text))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented."""
    write_atomically(path, json_writer(value))


def text_writer(text: str) -> Callable[[Path], None]:
    """What fills a UTF-8 text file, for `write_atomically` and `write_together`."""
    return lambda path: _flush(path, text)


def json_writer(value: Any) -> Callable[[Path], None]:
    """What fills an indented JSON file, for `write_atomically` and `write_together`."""
    return text_writer(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _umask() -> int:
    """The process's own; reading it means setting it for a moment."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def reason(error: Exception) -> str:
    """What the system said, without its error number and path where it has them apart."""
    return getattr(error, "strerror", None) or str(error)


def _flush(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
