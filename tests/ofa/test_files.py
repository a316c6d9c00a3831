"""Files are replaced atomically, and not overwritten by accident."""

from __future__ import annotations

import errno
import json
import os
import threading

import filelock
import pytest
from safetensors import SafetensorError

from ofa.errors import InputError
from ofa.files import LOCK, claim_folder, claimed_folder, write_atomically, write_json, write_text, write_together

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
# Raised by safetensors on a full disk; not an OSError.
NO_SPACE_IN_SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def fails_midway(error):
    def write(path):
        path.write_text("half")
        raise error

    return write


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_written_file_replaces_the_old_one(tmp_path):
    for text in ("old", "new: γ\n"):
        write_text(tmp_path / "file", text)
        assert (tmp_path / "file").read_bytes() == text.encode()
    write_json(tmp_path / "file", {"label": "größer", "n": 1})
    assert json.loads((tmp_path / "file").read_text(encoding="utf-8")) == {"label": "größer", "n": 1}
    assert len(contents(tmp_path)) == 1


@pytest.mark.parametrize("error", [NO_SPACE, NO_SPACE_IN_SAFETENSORS], ids=["system", "safetensors"])
@pytest.mark.parametrize("existed", [False, True], ids=["first write", "over an old file"])
def test_a_failed_write_leaves_what_was_there(tmp_path, error, existed):
    before = {"file": "old"} if existed else {}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=r"file cannot be written \(.*No space left on device.*\)"):
        write_atomically(tmp_path / "file", fails_midway(error))
    assert contents(tmp_path) == before


def test_a_failed_move_leaves_what_was_there(tmp_path, monkeypatch):
    write_text(tmp_path / "file", "old")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(NO_SPACE))
    with pytest.raises(InputError, match="No space left on device"):
        write_text(tmp_path / "file", "new")
    assert contents(tmp_path) == {"file": "old"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError])
def test_other_interruptions_pass_through_and_clean_up(tmp_path, error):
    """Ctrl-C and programming errors keep their own traceback."""
    (tmp_path / "file").write_text("old")
    with pytest.raises(error):
        write_atomically(tmp_path / "file", fails_midway(error()))
    assert contents(tmp_path) == {"file": "old"}


@pytest.mark.parametrize("failing", range(3))
def test_files_that_belong_together_change_together(tmp_path, failing):
    before = {f"file{i}": f"old {i}" for i in range(3)}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    writers = {tmp_path / name: lambda path: path.write_text("new") for name in before}
    write_together(writers)
    assert set(contents(tmp_path).values()) == {"new"}
    after = contents(tmp_path)
    with pytest.raises(InputError, match=f"file{failing} cannot be written"):
        write_together(writers | {tmp_path / f"file{failing}": fails_midway(NO_SPACE)})
    assert contents(tmp_path) == after


def test_a_path_below_a_file_is_refused_with_the_path(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(InputError, match=r"below cannot be written \(Not a directory\)"):
        write_text(tmp_path / "file" / "below", "new")
    with pytest.raises(InputError, match=r"folder .*below cannot be written \(Not a directory\)"):
        claim_folder(tmp_path / "file" / "below")
    assert contents(tmp_path) == {"file": "old"}


def test_a_missing_folder_is_made_with_its_parents(tmp_path):
    target = claim_folder(tmp_path / "a" / "b")
    assert target.is_dir()
    assert claim_folder(str(target)) == target


@pytest.mark.parametrize(("held", "words"), [(["x"], "already holds x;"), (["x", "y"], "already holds x and more;")])
def test_a_folder_that_is_not_empty_is_refused_without_overwrite(tmp_path, held, words):
    for name in held:
        (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"{words} choose another one or pass --overwrite"):
        claim_folder(tmp_path)
    assert claim_folder(tmp_path, overwrite=True) == tmp_path
    assert contents(tmp_path) == dict.fromkeys(held, "mine")


def test_a_file_is_refused_as_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"folder .*file cannot be written"):
        claim_folder(tmp_path / "file", overwrite=True)
    assert contents(tmp_path) == {"file": "mine"}


def test_a_folder_without_room_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: (_ for _ in ()).throw(NO_SPACE))
    with pytest.raises(InputError, match="No space left on device"):
        claim_folder(tmp_path)


@pytest.mark.parametrize("kind", [filelock.FileLock, filelock.SoftFileLock], ids=["locks", "no locks"])
def test_a_folder_that_another_process_writes_into_is_refused_and_left_alone(tmp_path, monkeypatch, kind):
    """Two runs in one folder would interleave their records; also on file systems without locks."""
    if kind is filelock.SoftFileLock:
        monkeypatch.setattr(filelock.FileLock, "acquire", without_locks)
    with kind(tmp_path / LOCK), pytest.raises(InputError, match=r"is writing to .*; wait until it ends"):
        claimed_folder(tmp_path, overwrite=True).__enter__()
    with claimed_folder(tmp_path):  # and its lock is nothing that the folder holds
        pass
    assert contents(tmp_path) == {}


def without_locks(lock, timeout):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_work_in_a_claimed_folder_claims_it_again_but_other_threads_do_not(tmp_path):
    """`ofa fit` claims its folder, and so do training and saving inside it."""
    refused = []

    def elsewhere():
        try:
            claimed_folder(tmp_path, overwrite=True).__enter__()
        except InputError as error:
            refused.append(str(error))

    with claimed_folder(tmp_path):
        with claimed_folder(tmp_path):
            write_text(tmp_path / "file", "inner")
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert f"another process ({os.getpid()} on " in refused[0]
    assert contents(tmp_path) == {"file": "inner"}


def test_a_claim_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), claimed_folder(tmp_path / "a" / "b"):
        raise KeyboardInterrupt
    assert contents(tmp_path) == {}
