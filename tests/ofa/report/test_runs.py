"""Reading the notes of runs; a missing or damaged note is not an error."""

from __future__ import annotations

import json

import pytest

from ofa.comparison.store import RUN
from ofa.report.runs import NO_RUNS, Runs, read_runs


def test_commands_come_in_their_order_and_once(tmp_path):
    newest = {
        "command": "ofa compare --out 'my results'",
        "cells": ["b", "c"],
        "earlier": [{"command": "ofa compare", "cells": ["a", "b"]}, {"command": "ofa compare", "cells": []}],
    }
    (tmp_path / RUN).write_text(json.dumps(newest), encoding="utf-8")
    assert read_runs(tmp_path) == Runs(("ofa compare", "ofa compare --out 'my results'"), frozenset("abc"))


@pytest.mark.parametrize("note", [None, "{", "[]", "{}"])
def test_a_damaged_note_is_ignored(tmp_path, note):
    if note is not None:
        (tmp_path / RUN).write_text(note, encoding="utf-8")
    assert read_runs(tmp_path) == NO_RUNS
