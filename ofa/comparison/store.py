"""Store a comparison in a folder: one JSON line for each finished cell, and notes of its runs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ofa.comparison.records import PROTOCOL, Record, other_protocol
from ofa.errors import InputError
from ofa.files import at_home, claim_folder, reason, sole_writer, write_json

RESULTS = "results.jsonl"
RUN = "run.json"

logger = logging.getLogger(__name__)


def read_records(folder: str | Path) -> list[Record]:
    """Read the last record of each cell of a comparison's folder, in the order of their completion.

    The folder is not modified, and another run may be writing to it.

    Raises:
        InputError: there are no results, or a line is damaged or of another version of the protocol than the first.
    """
    path = at_home(folder) / RESULTS
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({reason(error)}): give the folder that `ofa compare --out` wrote"
        ) from error
    whole, torn = _whole_lines(content)
    if torn:
        logger.warning("the last line of %s is incomplete and is ignored", path)
    return _parsed(whole, path)


class ResultsFile:
    """The results file of a folder, locked by one run; see `opened`."""

    def __init__(self, path: Path, descriptor: int, records: list[Record]) -> None:
        self.path = path
        self._descriptor = descriptor
        self._records = {record.cell.key: record for record in records}

    @property
    def records(self) -> tuple[Record, ...]:
        """The last record of each cell, those of earlier runs included."""
        return tuple(self._records.values())

    def append(self, record: Record) -> None:
        """Append the record of a finished cell, synced to disk, completely or not at all.

        Raises:
            InputError: the disk is full or failing; earlier lines are kept.
        """
        end = os.fstat(self._descriptor).st_size
        # Half a surrogate pair, which an error may quote, is not valid UTF-8; its escape is valid JSON.
        line = record.to_line().encode("utf-8", "backslashreplace") + b"\n"
        try:
            _write_whole(self._descriptor, line)
            os.fsync(self._descriptor)
        except OSError as error:
            with suppress(OSError):  # readers drop an incomplete last line
                os.ftruncate(self._descriptor, end)
            raise InputError(
                f"{self.path} cannot be written ({reason(error)}): the {len(self._records)} cells before this one are "
                "kept, make room and run the same command again"
            ) from error
        self._records.pop(record.cell.key, None)
        self._records[record.cell.key] = record

    def note_run(self, run: Mapping[str, object]) -> None:
        """Note a run (command, grid, versions) beside the results, before the notes of earlier runs.

        Raises:
            InputError: the file cannot be written.
        """
        path = self.path.with_name(RUN)
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = None
        earlier = [before, *before.pop("earlier", [])] if isinstance(before, dict) else []
        write_json(path, {"protocol": PROTOCOL, **run, "earlier": earlier})


@contextmanager
def opened(folder: str | Path) -> Iterator[ResultsFile]:
    """Open the results of a folder for a single run, creating it if needed; an incomplete last line is dropped.

    Raises:
        InputError: the folder cannot be written, holds something else or is used by another run, or its results are
            damaged or of another version of the protocol.
    """
    path = at_home(folder) / RESULTS
    claim_folder(folder, overwrite=True)
    with sole_writer(path.parent):
        claim_folder(folder, overwrite=path.is_file())
        with _opened_for_appending(path) as descriptor:
            yield ResultsFile(path, descriptor, _mended(path, descriptor))


@contextmanager
def _opened_for_appending(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({reason(error)}): choose another output folder") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _mended(path: Path, descriptor: int) -> list[Record]:
    whole, torn = _whole_lines(path.read_bytes())
    records = _parsed(whole, path, PROTOCOL)
    if torn:
        os.ftruncate(descriptor, len(whole))
        os.fsync(descriptor)
        logger.warning("the last line of %s is incomplete because a run was killed; its cell runs again", path)
    return records


def _whole_lines(content: bytes) -> tuple[bytes, bytes]:
    """Split into complete lines and an incomplete rest: a line and its newline are written together."""
    end = content.rfind(b"\n") + 1
    return content[:end], content[end:]


def _parsed(content: bytes, path: Path, protocol: int | None = None) -> list[Record]:
    """The last record of each cell; all must be of one version of the protocol, by default that of the first."""
    last: dict[str, Record] = {}
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        where = f"{path}, line {number}"
        record = Record.from_line(line.decode("utf-8", "replace"), where)
        protocol = protocol or record.protocol
        if record.protocol != protocol:
            raise other_protocol(where, record.protocol, protocol)
        last.pop(record.cell.key, None)
        last[record.cell.key] = record
    return list(last.values())


def _write_whole(descriptor: int, line: bytes) -> None:
    # Usually one call; a disk that fills up accepts a part and refuses the rest.
    while line:
        line = line[os.write(descriptor, line) :]
