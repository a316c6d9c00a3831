"""Run the command line in tests, and the small task for it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from ofa import cli

TEMPLATE = r"Sentence: {text}\nLabel:"

LABELS = "objective,subjective"

TRAIN = (
    ("the film opens in a small town", "objective"),
    ("a warm and funny delight", "subjective"),
    ("he meets his brother at the bank", "objective"),
    ("dull, slow and far too long", "subjective"),
    ("they leave for the islands", "objective"),
    ("it never drags", "subjective"),
)

TEST = (
    ("she writes a novel about the sea", "objective"),
    ("one of the finest of the year", "subjective"),
    ("the team is in the final", "objective"),
    ("a bore", "subjective"),
)

ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "ofa_config.json"}

FIT_FILES = ADAPTER_FILES | {"metrics.jsonl", "training.png"}


@dataclass(frozen=True)
class Finished:
    """The result of a command: exit status, standard output and standard error."""

    status: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def ofa(*arguments: object, stdin: str = "") -> Finished:
    """Run the command line in this process, and restore the process's state."""
    status, out, err, logger = 0, io.StringIO(), io.StringIO(), logging.getLogger("ofa")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", ["ofa", *map(str, arguments)]))
        stack.enter_context(mock.patch.object(sys, "stdin", io.StringIO(stdin)))
        stack.enter_context(mock.patch.dict(os.environ))
        os.environ.pop("FORCE_COLOR", None)
        os.environ["OMP_NUM_THREADS"] = "1"  # as all tests; those of other numbers give --threads
        # In a process of its own the command says so by the environment, before transformers is imported.
        stack.enter_context(mock.patch("transformers.utils.logging._tqdm_active", False))
        stack.enter_context(mock.patch.object(logger, "handlers", []))
        stack.enter_context(mock.patch.object(logger, "propagate", True))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            cli.main()
        except SystemExit as leave:
            status = int(leave.code or 0)
    return Finished(status, out.getvalue(), err.getvalue())


def done(*arguments: object, stdin: str = "") -> Finished:
    """Run a command that must succeed."""
    finished = ofa(*arguments, stdin=stdin)
    assert finished.status == 0, finished.err
    return finished


def write_rows(file: Path, rows, columns: tuple[str, str] = ("text", "label")) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows), encoding="utf-8")
    return file


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}
