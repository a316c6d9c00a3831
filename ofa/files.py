"""Write files atomically, and lock output folders so that one process at a time writes into them."""

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

Json = dict[str, Any]
"""A JSON object, of a file or for one: its values have the types that its writer gave them."""

# Raised on a full or read-only disk; safetensors wraps the system's error.
WRITE_ERRORS = (OSError, SafetensorError)

LOCK = ".ofa.lock"
"""Lock file in an output folder, removed when the process has finished."""

_owners: dict[Path, int] = {}
"""Folders locked by this process, and the thread that locked each."""


def at_home(path: str | os.PathLike[str]) -> Path:
    """Expand ~ in a path; shells do not expand it after `=`, and never in a configuration file."""
    # Path.expanduser raises for an unknown user; here, such a path is an ordinary name.
    return Path(os.path.expanduser(path))


def claim_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Create the folder if needed, and check that it is writable, and empty unless `overwrite`.

    Raises:
        InputError: it cannot be written, is a file, or is not empty and `overwrite` is off.
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
    """`claim_folder` for the body of the `with`; the folder is locked for other processes unless `shared`.

    If the body fails before it wrote anything, created folders are removed. The same thread may claim the folder again
    inside.

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
    """Lock a folder for writing, for one process on any machine at a time.

    The file system's lock is released when the process ends in any way. NFS (version 4, or 3 with lockd), SMB and
    Lustre mounted with `flock` lock between machines. On a file system without locks, the existence of the lock file
    marks the folder as locked; a file left by a killed process is taken over on the same machine, and named in the
    error on others.

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
            with suppress(OSError):  # unlink before release, or another process could lock the unlinked file
                file.unlink()
        lock.release()


def _locked(folder: Path) -> FileLock | SoftFileLock:
    file = folder / LOCK
    for kind in (FileLock, SoftFileLock):
        lock = kind(file)
        try:
            lock.acquire(timeout=0)
            while isinstance(lock, FileLock) and not file.exists():  # its last owner unlinked it meanwhile
                lock.release()
                lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                f"another process{_owner(file)} is writing to {folder}; wait until it ends, or choose another output "
                f"folder{'' if kind is FileLock else f' (delete {file} if that process has ended)'}"
            ) from error
        except OSError as error:  # of network file systems without a lock service
            failure = error
        else:
            return lock
    raise InputError(f"{file} cannot be locked ({reason(failure)}); choose another output folder") from failure


def _owner(lock: Path) -> str:
    """The process that holds a lock, from its file."""
    try:
        number, machine = lock.read_text().split()[:2]
    except (OSError, ValueError):
        return ""
    return f" ({number} on {machine})"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`.

    Raises:
        InputError: the file cannot be written; an existing file at `path` is unchanged.
    """
    write_together({path: write})


def write_together(files: Mapping[Path, Callable[[Path], None]]) -> None:
    """Fill a temporary file beside each path; when all are complete, rename them in the given order.

    Raises:
        InputError: one of them cannot be written; existing files are unchanged.
    """
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    path = next(iter(files))
    try:
        for path, write in files.items():
            write(temporaries[path])
            # safetensors makes files readable only by their owner, but adapters are shared.
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


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically, indented."""
    write_atomically(path, json_writer(value))


def text_writer(text: str) -> Callable[[Path], None]:
    """A writer of a UTF-8 text file, for `write_atomically` and `write_together`."""
    return lambda path: _flush(path, text)


def json_writer(value: object) -> Callable[[Path], None]:
    """A writer of an indented JSON file, for `write_atomically` and `write_together`."""
    return text_writer(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def reason(error: Exception) -> str:
    """The system's message, without error number and path."""
    return getattr(error, "strerror", None) or str(error)


def _flush(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
