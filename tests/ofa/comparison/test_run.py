"""Handling the events of workers: records are written at once, and incompatible workers are refused."""

from __future__ import annotations

import json

import pytest

from ofa.comparison.records import Record
from ofa.comparison.run import run_cells
from ofa.comparison.store import RUN, opened, read_records
from ofa.comparison.workers import Ready
from ofa.errors import InputError

OURS = {"weights": "aa"}


class Scripted:
    """Events that are given; notes whether they were closed."""

    def __init__(self, *events):
        self._events, self.closed = events, False

    def __iter__(self):
        try:
            yield from self._events
        finally:
            self.closed = True


@pytest.fixture
def carry_out(make_plan, tmp_path):
    """Runs a script in a folder, whose earlier records may be given."""
    plan = make_plan(methods="zero-shot,icl", seeds="1")

    def run(events, earlier=()):
        heard = []

        def finished(record):
            heard.append(f"finished {record.cell.method}, {len(read_records(tmp_path))} on disk")

        with opened(tmp_path) as results:
            for record in earlier:
                results.append(record)
            run_cells(plan.model, iter(events), results, finished, heard.append, {"command": "ofa compare"})
        return heard

    return plan, run


def test_records_are_on_disk_before_progress_shows_them(carry_out, tmp_path):
    plan, run = carry_out
    first, second = plan.cells
    events = [Ready(OURS), Record(first), "so far", Record(second, error="no")]
    assert run(Scripted(*events)) == ["finished zero-shot, 1 on disk", "so far", "finished icl, 2 on disk"]
    assert json.loads((tmp_path / RUN).read_text())["command"] == "ofa compare"


@pytest.mark.parametrize(
    ("events", "earlier", "words"),
    [
        ([Ready({**OURS, "weights": "bb"})], {"weights": "aa"}, "made with other weights of a-model"),
        ([Ready(OURS), Ready({**OURS, "weights": "bb"})], {}, "made with other weights of a-model"),
    ],
    ids=["other results", "another worker"],
)
def test_what_must_not_be_mixed_ends_the_run_and_its_workers(carry_out, events, earlier, words):
    plan, run = carry_out
    scripted = Scripted(*events, Record(plan.cells[0]))
    with pytest.raises(InputError, match=words):
        run(scripted, [Record(plan.cells[0], versions=earlier)])
    assert scripted.closed


def test_failed_cells_without_a_worker_say_nothing_of_weights(carry_out):
    plan, run = carry_out
    run(Scripted(Ready(OURS), Record(plan.cells[0])), [Record(plan.cells[1], error="3 workers died")])
