"""Handling an engine's events: records are written at once, and incompatible workers are refused."""

from __future__ import annotations

import json

import pytest

from ofa import __version__
from ofa.comparison.engines import Finished, Notice, Ready, Started
from ofa.comparison.records import Record
from ofa.comparison.run import run_cells
from ofa.comparison.store import RUN, opened, read_records
from ofa.errors import InputError

OURS = {"ofa-adapt": __version__, "weights": "aa"}


class Told:
    """Notes the progress, and how many records were on disk when a cell was said to be finished."""

    def __init__(self, folder):
        self.folder, self.heard = folder, []

    def started(self, cell):
        self.heard.append(f"started {cell.method}")

    def finished(self, record):
        self.heard.append(f"finished {record.cell.method}, {len(read_records(self.folder))} on disk")

    def say(self, text):
        self.heard.append(text)


class Scripted:
    """An engine whose events are given; notes whether it was closed."""

    workers = 1

    def __init__(self, *events):
        self.events, self.closed = events, False

    def run(self, cells, job):
        try:
            yield from self.events
        finally:
            self.closed = True


@pytest.fixture
def carry_out(make_plan, tmp_path):
    """Runs a script in a folder, whose earlier records may be given."""
    plan = make_plan(methods="zero-shot,icl", seeds="1")

    def run(engine, earlier=()):
        told = Told(tmp_path)
        with opened(tmp_path) as results:
            for record in earlier:
                results.append(record)
            run_cells(plan, plan.cells, results, engine, told, {"command": "ofa compare"})
        return told.heard

    return plan, run


def test_records_are_on_disk_before_progress_shows_them(carry_out, tmp_path):
    plan, run = carry_out
    first, second = plan.cells
    events = [Ready(OURS), Started(first, 1), Finished(Record(first)), Notice("so far")]
    events += [Started(second, 1), Finished(Record(second, error="no"))]
    assert run(Scripted(*events)) == [
        "started icl",
        "finished icl, 1 on disk",
        "so far",
        "started zero-shot",
        "finished zero-shot, 2 on disk",
    ]
    assert json.loads((tmp_path / RUN).read_text())["command"] == "ofa compare"


@pytest.mark.parametrize(
    ("events", "earlier", "words"),
    [
        ([Ready({**OURS, "weights": "bb"})], {"weights": "aa"}, "made with other weights of a-model"),
        ([Ready(OURS), Ready({**OURS, "weights": "bb"})], {}, "made with other weights of a-model"),
        ([Ready({**OURS, "ofa-adapt": "0.0.1"})], {}, "a worker has ofa-adapt 0.0.1, not "),
    ],
    ids=["other results", "another worker", "another version"],
)
def test_what_must_not_be_mixed_ends_the_run_and_its_workers(carry_out, events, earlier, words):
    plan, run = carry_out
    engine = Scripted(*events, Finished(Record(plan.cells[0])))
    with pytest.raises(InputError, match=words):
        run(engine, [Record(plan.cells[0], versions=earlier)])
    assert engine.closed


def test_failed_cells_without_a_worker_say_nothing_of_weights(carry_out):
    plan, run = carry_out
    run(Scripted(Ready(OURS), Finished(Record(plan.cells[0]))), [Record(plan.cells[1], error="3 workers died")])
