"""Finished cells survive: kills, torn lines, full disks, other runs, other versions."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ofa.comparison import store
from ofa.comparison.records import PROTOCOL, Cell, Record, Score
from ofa.comparison.store import RESULTS, RUN, opened, read_records
from ofa.errors import InputError


def record(number: int, **values) -> Record:
    cell = Cell("m", "mood", "0" * 64, "ofa", number, 5, 4, {"sharpness": 0.01})
    score = Score({"accuracy": 0.5}, (0, 1), (1, 1), 0.01, 3)
    return Record(cell, **{"scores": {"prompt": score}, "notes": {"said": "größer"}, **values})


def filled(folder: Path, count: int = 3) -> list[Record]:
    records = [record(number) for number in range(count)]
    with opened(folder) as results:
        for one in records:
            results.append(one)
    return records


def test_what_is_appended_is_read_again(tmp_path):
    """By readers of the folder, and by the next run; the file is JSON lines."""
    records = filled(tmp_path)
    assert read_records(tmp_path) == records
    with opened(tmp_path) as results:
        assert results.records == tuple(records)
        results.append(record(3, error="half \udc80 a pair", scores={}))
    lines = (tmp_path / RESULTS).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["cell"]["seed"] for line in lines] == [0, 1, 2, 3]
    assert read_records(tmp_path)[3].error == "half \udc80 a pair"


def test_the_last_record_of_a_cell_counts(tmp_path):
    """A failed cell that ran again is at the position of its last run."""
    with opened(tmp_path) as results:
        for one in (record(0, error="no"), record(1), record(0)):
            results.append(one)
        assert results.records == (record(1), record(0))
    assert read_records(tmp_path) == [record(1), record(0)]


# Lines cut short


@pytest.mark.parametrize("left", ["one byte", "half", "all but the line end"])
def test_a_torn_last_line_is_dropped_with_one_notice_and_the_file_goes_on(tmp_path, caplog, left):
    records = filled(tmp_path)
    file = tmp_path / RESULTS
    line = records[2].to_line().encode()
    size = {"one byte": 1, "half": len(line) // 2, "all but the line end": len(line)}[left]
    whole = file.read_bytes()[: -len(line) - 1]
    file.write_bytes(whole + line[:size])
    assert read_records(tmp_path) == records[:2]
    assert file.read_bytes() == whole + line[:size], "a reader changes nothing: a run may be at work"
    caplog.clear()
    with opened(tmp_path) as results:
        assert results.records == tuple(records[:2])
        results.append(records[2])
    assert [entry.getMessage() for entry in caplog.records] == [
        f"the last line of {file} is incomplete because a run was killed; its cell runs again"
    ]
    assert read_records(tmp_path) == records


WRITER = """
import sys
from ofa.comparison.records import Cell, Record
from ofa.comparison.store import opened
with opened(sys.argv[1]) as results:
    number = len(results.records)
    print(number, flush=True)
    while True:
        results.append(Record(Cell("m", "t", "0", "ofa", number, 5, 4), notes={"filling": "x" * 50_000}))
        number += 1
"""


def test_a_writer_that_is_killed_at_any_moment_leaves_whole_lines(tmp_path):
    """Four writers, one after the other, each killed with SIGKILL while it appends."""
    total = 0
    for pause in (0.05, 0.08, 0.11, 0.14):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert int(writer.stdout.readline()) == total, "what an earlier writer had finished is still there"
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        seeds = [one.cell.seed for one in read_records(tmp_path)]
        assert seeds == list(range(len(seeds)))
        assert len(seeds) > total
        total = len(seeds)


# Disks


def full_after(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """A disk that takes `room` more bytes, the last of them as a part of a write."""
    write = os.write
    left = [room]

    def limited(descriptor: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = write(descriptor, data[: left[0]])
        left[0] -= taken
        return taken

    monkeypatch.setattr(store.os, "write", limited)


@pytest.mark.parametrize("part", [0, 1, 200])
def test_a_full_disk_keeps_the_finished_cells_and_stops_with_one_sentence(tmp_path, monkeypatch, part):
    """After a partial write or none, the file ends with the last complete line."""
    records = filled(tmp_path)
    before = (tmp_path / RESULTS).read_bytes()
    with opened(tmp_path) as results:
        full_after(monkeypatch, len(record(3).to_line().encode()) + 1 + part)
        results.append(record(3))
        with pytest.raises(InputError) as stopped:
            results.append(record(4))
        monkeypatch.undo()
        assert results.records == (*records, record(3))
    assert str(stopped.value) == (
        f"{tmp_path / RESULTS} cannot be written (No space left on device): the 4 cells before this one are kept, make "
        "room and run the same command again"
    )
    assert (tmp_path / RESULTS).read_bytes() == before + record(3).to_line().encode() + b"\n"


def test_a_disk_that_fails_when_it_is_asked_to_keep_the_line_counts_as_full(tmp_path, monkeypatch):
    """Some file systems find out at fsync."""
    records = filled(tmp_path)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with opened(tmp_path) as results:
        monkeypatch.setattr(store.os, "fsync", fail)
        with pytest.raises(InputError, match="Disk quota exceeded"):
            results.append(record(3))
        monkeypatch.undo()
    assert read_records(tmp_path) == records


def test_a_tail_that_cannot_be_removed_is_dropped_by_the_next_run(tmp_path, monkeypatch):
    records = filled(tmp_path)

    def fail(descriptor: int, size: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(tmp_path) as results:
        full_after(monkeypatch, 100)
        monkeypatch.setattr(store.os, "ftruncate", fail)
        with pytest.raises(InputError, match="No space left"):
            results.append(record(3))
        monkeypatch.undo()
    assert (tmp_path / RESULTS).read_bytes()[-1:] != b"\n"
    with opened(tmp_path) as results:
        assert results.records == tuple(records)


def test_every_line_is_on_disk_before_it_counts(tmp_path, monkeypatch):
    """One write of the whole line at the end of the file, then fsync: a kill leaves complete lines."""
    calls: list[tuple[str, bytes]] = []
    write, fsync = os.write, os.fsync
    with opened(tmp_path) as results:
        monkeypatch.setattr(store.os, "write", lambda d, data: calls.append(("write", data)) or write(d, data))
        monkeypatch.setattr(store.os, "fsync", lambda d: calls.append(("fsync", b"")) or fsync(d))
        results.append(record(0))
    assert calls == [("write", record(0).to_line().encode() + b"\n"), ("fsync", b"")]


# Refusals


def spoil(folder: Path, change: Callable[[str], str]) -> None:
    file = folder / RESULTS
    first, *others = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join([first, change(others[0]), *others[1:]]), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda line: line.replace(f'"protocol": {PROTOCOL}', '"protocol": 0'),
            r"results.jsonl, line 2 has version 0 of the protocol, .* with version \d+: choose another output",
        ),
        (
            lambda line: line.replace(f'"protocol": {PROTOCOL}', '"protocol": 1'),
            rf"line 2 has version 1 of the protocol, which must not be mixed with version {PROTOCOL}",
        ),
        (lambda line: line[:40] + "\n", "line 2 is no record of a comparison .*remove the line"),
        (lambda line: "\n", "line 2 is no record"),
        (lambda line: "[]\n", "line 2 is no record"),
        (lambda line: line.replace('"seed"', '"seeds"'), "line 2 is no record"),
    ],
    ids=["protocol", "earlier protocol", "cut", "empty", "list", "field"],
)
def test_other_versions_and_damage_in_the_middle_are_refused_and_kept(tmp_path, change, words):
    """By readers and by runs, which would mix incompatible results."""
    filled(tmp_path)
    spoil(tmp_path, change)
    before = (tmp_path / RESULTS).read_bytes()
    with pytest.raises(InputError, match=words):
        read_records(tmp_path)
    with pytest.raises(InputError, match=words), opened(tmp_path):
        pass
    assert (tmp_path / RESULTS).read_bytes() == before


def test_records_of_an_earlier_version_are_read_and_get_no_newer_ones(tmp_path):
    """The cells have the same keys as today's, whose defaults are others: a run that continued would mix them."""
    written = [replace(record(number), protocol=1) for number in range(2)]
    (tmp_path / RESULTS).write_text("".join(one.to_line() + "\n" for one in written), encoding="utf-8")
    assert read_records(tmp_path) == written
    with pytest.raises(InputError, match=r"line 1 has version 1 of the protocol, .* choose another"), opened(tmp_path):
        pass


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    with opened(tmp_path), pytest.raises(InputError, match=r"another process .* is writing"), opened(tmp_path):
        pass
    with opened(tmp_path):
        pass


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"already holds thesis\.tex"), opened(tmp_path):
        pass
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_without_results_is_no_comparison(tmp_path):
    with pytest.raises(InputError, match=r"results.jsonl cannot be read .*--out"):
        read_records(tmp_path)


def test_results_that_may_not_be_written_are_refused(tmp_path, monkeypatch):
    """The tests may run as root, who may write anything, so the system call is stubbed."""
    filled(tmp_path)
    open_file = os.open

    def refuse(path, flags, *args):
        if str(path).endswith(RESULTS):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open_file(path, flags, *args)

    monkeypatch.setattr(store.os, "open", refuse)
    with pytest.raises(InputError, match=r"results.jsonl cannot be written \(Permission denied\)"), opened(tmp_path):
        pass


# Notes of runs


def test_runs_are_noted_the_newest_in_front(tmp_path):
    with opened(tmp_path) as results:
        for name in ("first", "second", "third"):
            results.note_run({"command": name})
    noted = json.loads((tmp_path / RUN).read_text())
    assert (noted["command"], noted["protocol"]) == ("third", PROTOCOL)
    assert [run["command"] for run in noted["earlier"]] == ["second", "first"]
    assert not any("earlier" in run for run in noted["earlier"])


def test_a_note_that_was_damaged_stops_nothing(tmp_path):
    with opened(tmp_path) as results:
        (tmp_path / RUN).write_text("[]")
        results.note_run({"command": "again"})
    assert json.loads((tmp_path / RUN).read_text())["earlier"] == []


def test_records_of_other_cells_are_other_records():
    """The key depends on every field of a cell."""
    cell = record(0).cell
    changes = {"model": "x", "task": "x", "task_sha256": "x", "method": "x", "seed": 9, "shots": 9, "test_size": 9}
    others = [replace(cell, **{name: value}) for name, value in changes.items()] + [replace(cell, settings={})]
    assert len({cell.key, *(other.key for other in others)}) == 9
