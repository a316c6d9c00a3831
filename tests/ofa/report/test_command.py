"""`ofa report`: writes both files from a results folder, and refuses bad input in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ofa.commands.report import report
from ofa.comparison.records import PROTOCOL
from ofa.report import MARKDOWN, PAGE
from tests.ofa.report.synthetic import RESULTS, record, with_accuracy, write

app = typer.Typer()
app.command()(report)


def ofa_report(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    records = [
        record(method, {"prompt": with_accuracy(right)}, seed=seed)
        for method, right in (("norm-tuning", 7), ("ofa", 6))
        for seed in (1, 2)
    ]
    return write(tmp_path / "results", records)


def test_both_files_are_written_beside_the_results(results):
    done = ofa_report(results)
    assert done.exit_code == 0
    assert {file.name for file in results.iterdir()} == {RESULTS, MARKDOWN, PAGE}
    assert "Highest without demonstrations: norm-tuning, 70.0 ± 0.0 %" in done.stdout
    assert "With OFA's terms, norm tuning changes by −10.0 points" in done.stdout
    assert str(results / PAGE) in done.stderr


def test_a_second_report_replaces_the_first_and_is_equal(results):
    ofa_report(results)
    first = (results / PAGE).read_text()
    ofa_report(results)
    assert (results / PAGE).read_text() == first


def test_another_folder_can_be_chosen_and_the_results_stay_as_they_are(results, tmp_path):
    before = {file.name: file.read_bytes() for file in results.iterdir()}
    assert ofa_report(results, "--out", tmp_path / "new" / "report").exit_code == 0
    assert {file.name for file in (tmp_path / "new" / "report").iterdir()} == {MARKDOWN, PAGE}
    assert {file.name: file.read_bytes() for file in results.iterdir()} == before


def test_json_is_one_document_of_unrounded_numbers(results):
    document = json.loads(ofa_report(results, "--json").stdout)
    (comparison,) = document["comparisons"]
    rows = {row["row"]: row for row in comparison["rows"]}
    assert rows["ofa"]["accuracy"] == {"mean": 0.6, "deviation": 0.0, "count": 2}
    assert rows["ofa"]["against"]["norm-tuning"]["mean"] == pytest.approx(-0.1)
    assert rows["ofa"]["against"]["norm-tuning"]["losses"] == 2
    assert rows["norm-tuning"]["context"] == "prompt"
    assert document["files"] == [str(results / MARKDOWN), str(results / PAGE)]


def test_one_cell_is_enough(tmp_path):
    folder = write(tmp_path / "one", [record("zero-shot", {"prompt": with_accuracy(5)})])
    done = ofa_report(folder)
    assert done.exit_code == 0
    assert "zero-shot, 50.0 %, the only row with every task" in done.stdout


def test_only_failures_are_a_report_too(tmp_path):
    folder = write(tmp_path / "failed", [record("ofa", None, error="the loss is not a number")])
    assert ofa_report(folder).exit_code == 0
    assert "the loss is not a number" in (folder / MARKDOWN).read_text()


def spoiled(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / RESULTS).write_text(content, encoding="utf-8")
    return folder


WRITTEN = record("ofa", {"prompt": with_accuracy(5)}).to_line() + "\n"
OTHER_PROTOCOL = WRITTEN.replace(f'"protocol": {PROTOCOL}', '"protocol": 0')


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "give the folder that `ofa compare --out` wrote"),
        ("", "has no finished cell yet"),
        ("{}\n", "line 1 is no record of a comparison"),
        (OTHER_PROTOCOL, "has version 0 of the protocol"),
    ],
    ids=["no folder", "empty", "damaged", "another protocol"],
)
def test_folders_without_a_comparison_are_refused_and_nothing_is_written(tmp_path, content, sentence):
    folder = tmp_path / "results" if content is None else spoiled(tmp_path / "results", content)
    done = ofa_report(folder, "--out", tmp_path / "report")
    assert done.exit_code == 2
    assert done.stderr.startswith("ofa: ")
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "report").exists()


def test_an_unwritable_folder_is_named(results, tmp_path):
    (tmp_path / "file").write_text("")
    done = ofa_report(results, "--out", tmp_path / "file" / "report")
    assert done.exit_code == 2
    assert "cannot be written" in done.stderr
