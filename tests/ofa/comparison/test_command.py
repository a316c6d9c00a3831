"""`ofa compare` from options to results: cells that run, resume or are refused, here in this process."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex

import pytest

from ofa.comparison import store
from ofa.comparison.records import PROTOCOL
from ofa.comparison.store import RESULTS, RUN, read_records
from tests.ofa.command_line import Finished, ofa
from tests.ofa.comparison.conftest import BROKEN, but_for_times

pytestmark = pytest.mark.usefixtures("here")


class Compared(Finished):
    @property
    def told(self):
        """The lines on standard error, without the estimates."""
        return [line.removeprefix("ofa: ") for line in self.err.splitlines()]


def run(*arguments: object) -> Compared:
    """Run the command in this process."""
    return Compared(**vars(ofa("compare", *arguments)))


@pytest.fixture
def options(tiny_folder, tasks, tmp_path) -> list[object]:
    """A grid of two cells for each seed."""
    given = ["--model", tiny_folder, "--tasks", tasks["mood"], "--methods", "zero-shot,icl", "--shots", 1]
    return [*given, "--test-size", 4, "--out", tmp_path / "out"]


def config(tmp_path, **values):
    file = tmp_path / "grid.yaml"
    file.write_text(json.dumps(values))
    return ["--config", file]


# Running and continuing


def test_a_second_run_does_only_what_is_missing(options, tmp_path):
    first = run(*options, "--seeds", "1-2")
    assert first.status == 0
    assert first.told[0] == "0 of 4 cells are there, 4 to run"
    lines = (tmp_path / "out" / RESULTS).read_text().splitlines()
    assert len(lines) == 4
    more = run(*options, "--seeds", "1-3")
    assert more.told[0] == "4 of 6 cells are there, 2 to run"
    assert (tmp_path / "out" / RESULTS).read_text().splitlines()[:4] == lines
    again = run(*options, "--seeds", "1-3", "--json")
    assert again.told == ["6 of 6 cells are there, 0 to run"]
    assert (again.json["done"], again.json["failed"], again.json["left"]) == (6, 0, 0)
    assert {(row["method"], row["context"], row["seeds"]) for row in again.json["accuracy"]} == {
        ("zero-shot", "prompt", 3),
        ("icl", "demonstrations", 3),
    }
    assert len(read_records(tmp_path / "out")) == 6


def test_the_folder_tells_what_was_run(options, tmp_path):
    """Command, grid, versions, cells; newest run first, refused runs not at all."""
    run(*options, "--seeds", "1")
    run(*options, "--seeds", "1-2")
    run(*options, "--seeds", "1-3", "--dtype", "float16")
    noted = json.loads((tmp_path / "out" / RUN).read_text())
    assert noted["earlier"][0]["command"] == shlex.join(map(str, ["ofa", "compare", *options, "--seeds", "1"]))
    assert noted["grid"]["seeds"] == [1, 2]
    assert noted["grid"]["methods"] == [{"zero-shot": {}}, {"icl": {}}]
    assert (noted["protocol"], noted["test_seed"]) == (PROTOCOL, 42)
    assert (noted["machines"]["workers"], noted["machines"]["device"]) == (None, "auto")
    assert {"ofa-adapt", "torch", "python"} <= noted["versions"].keys()
    assert set(noted["cells"]) == {record.cell.key for record in read_records(tmp_path / "out")}


def test_a_failed_cell_stops_nothing_and_is_run_again_on_request(options, tmp_path):
    methods = {"zero-shot": None, "norm-tuning": BROKEN}
    given = [*options[:4], *options[6:], "--seeds", "1", *config(tmp_path, methods=methods)]
    first = run(*given)
    assert first.status == 1
    assert first.told[-1] == "1 of 2 cells failed; the same command with --retry-failed runs them again"
    failed = next(record for record in read_records(tmp_path / "out") if not record.done)
    assert "try a lower learning rate" in failed.error
    assert run(*given).told[0] == "2 of 2 cells are there, 0 to run"
    again = run(*given, "--retry-failed", "--json")
    assert again.told[0] == "1 of 2 cells are there, 1 to run"
    assert again.json["failures"][0]["error"] == failed.error
    assert len((tmp_path / "out" / RESULTS).read_text().splitlines()) == 3
    assert len(read_records(tmp_path / "out")) == 2


def test_a_disk_that_fills_up_keeps_the_finished_cells_and_the_next_run_goes_on(options, tmp_path, monkeypatch):
    """The third line is written by half. The results equal those of a run with free space."""
    write, lines = os.write, []

    def limited(descriptor, data):
        lines.append(data)
        if len(lines) == 3:
            return write(descriptor, data[:100])
        if len(lines) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "write", limited)
        stopped = run(*options, "--seeds", "1-2")
    assert stopped.status == 2
    assert stopped.told[-1].endswith(
        "(No space left on device): the 2 cells before this one are kept, make room and run the same command again"
    )
    assert "Traceback" not in stopped.err
    assert len(read_records(tmp_path / "out")) == 2
    assert run(*options, "--seeds", "1-2").told[0] == "2 of 4 cells are there, 2 to run"
    run(*options[:-1], tmp_path / "other", "--seeds", "1-2")
    results = [[but_for_times(record) for record in read_records(tmp_path / name)] for name in ("out", "other")]
    assert results[0] == results[1]


def test_settings_make_rows_and_options_win_over_the_file(options, tmp_path, tiny_folder, tasks):
    file = config(
        tmp_path,
        model=str(tiny_folder),
        tasks=[tasks["mood"]],
        methods={"norm-tuning": {"learning_rate": ["1e-3", 0.01], "epochs": 1}},
        seeds=[5],
        shots=1,
        **{"test-size": 4},
        out=str(tmp_path / "named"),
        json=True,
    )
    done = run(*file, "--seeds", "6", "--out", tmp_path / "out")
    assert done.status == 0, done.err
    assert {row["method"] for row in done.json["accuracy"]} == {
        "norm-tuning (epochs=1, learning_rate=0.001)",
        "norm-tuning (epochs=1, learning_rate=0.01)",
    }
    assert {record.cell.seed for record in read_records(tmp_path / "out")} == {6}
    assert not (tmp_path / "named").exists()


def test_the_table_has_a_line_for_each_row_and_context(options):
    shown = run(*options, "--seeds", "1").out
    assert [word in shown for word in ("zero-shot", "icl", "demonstrations", "mood")] == [True] * 4


def test_fewer_test_examples_than_asked_for_are_said(options):
    told = run(*options, "--test-size", 500, "--seeds", "1").told
    assert told[0] == "mood is tested on 12 examples, as many as its classes have"


# Refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "sst22"], 'no task or folder "sst22"'),
        (["--methods", "icll"], 'no method "icll", did you mean "icl"'),
        (["--methods", ""], "the grid has no --methods"),
        (["--seeds", "42-"], 'the seeds "42-" cannot be read'),
        (["--shots", "9"], 'class "negative" has 8 training examples but 9 shots'),
        (["--shots", "8"], r"demonstrations of mood with seed 42 take \d+ tokens .* window is 256"),
        (["--model", "no/such/model/here"], "no folder .*no/such/model/here"),
        (["--out", "/proc/nothing"], "output folder /proc/nothing cannot be written"),
        (["--workers", "0"], "--workers 0 cannot be used"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
    ],
)
def test_invalid_options_are_refused_before_anything_runs(options, tmp_path, arguments, words):
    """No folder is made, no cell is run, no traceback is shown."""
    refused = run(*options, *arguments)
    assert refused.status == 2
    assert refused.out == ""
    assert len(refused.told) == 1, refused.err
    assert re.search(words, refused.told[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"task": ["a"]}, 'sets "task", which is no option, did you mean "tasks"'),
        ({"methods": {"ofa": {"sharpnes": 1}}}, 'ofa has no setting "sharpnes"'),
        ({"workers": "two"}, "invalid value for '--workers'"),
        ({"seeds": {"a": 1}}, "sets seeds to .*; write one plain value"),
    ],
)
def test_an_invalid_configuration_file_is_refused(options, tmp_path, values, words):
    given = options if "methods" not in values else [*options[:4], *options[6:]]
    refused = run(*given, *config(tmp_path, **values))
    assert refused.status == 2
    assert refused.err.count("\n") == 1
    assert re.search(words, refused.err)


def test_results_of_other_weights_or_another_protocol_are_not_mixed(options, tmp_path):
    run(*options, "--seeds", "1")
    file = tmp_path / "out" / RESULTS
    before = file.read_bytes()
    other = run(*options, "--seeds", "1-2", "--dtype", "bfloat16")
    assert (other.status, file.read_bytes()) == (2, before)
    assert "made with other weights of" in other.told[-1]
    file.write_bytes(before.replace(f'"protocol": {PROTOCOL}'.encode(), b'"protocol": 0'))
    old = run(*options, "--seeds", "1-2")
    assert old.status == 2
    assert "has version 0 of the protocol" in old.told[-1]
