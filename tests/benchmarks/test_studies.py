"""The page of the studies follows from the records: differences paired by draw, against the grid's first row."""

from __future__ import annotations

import pytest

from benchmarks import studies
from ofa.comparison.records import Cell, Record, Score
from ofa.comparison.store import RESULTS

GRID = """tasks: [a, b]
seeds: 1-2
shots: 5
contexts: prompt
methods:
  norm-tuning: [{max_steps: 60}, {}]
  zero-shot:
"""


def record(method, settings, task, seed, accuracy, likelihood, context="prompt", shots=5):
    cell = Cell("m", task, "0", method, seed, shots, 10, settings)
    metrics = {
        "accuracy": accuracy,
        "negative_log_likelihood": likelihood,
        "expected_calibration_error": 0.125,
        "confusion": [[1]],
    }
    return Record(cell, scores={context: Score(metrics, (0,), (0,), 0.01, 0)}, fit_seconds=30.0)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page with one study: a row lacks a cell, another has a different context and task."""
    folder = tmp_path / "records" / "steps"
    folder.mkdir(parents=True)
    base = {(task, seed): (0.5 + 0.1 * (task == "b"), 0.9) for task in "ab" for seed in (1, 2, 3)}
    kept = [record("norm-tuning", {"max_steps": 60}, *draw, *values) for draw, values in base.items()]
    kept += [record("norm-tuning", {}, *draw, acc - 0.02, nll + 0.1) for draw, (acc, nll) in base.items()][:5]
    kept += [record("zero-shot", {}, *draw, acc + 0.04, nll - 0.2) for draw, (acc, nll) in base.items()]
    kept += [
        record("icl", {}, "a", 1, 0.5, 0.9, "demonstrations"),
        record("icl", {}, "c", 1, 0.1, 9.0, "demonstrations"),
    ]
    (folder / RESULTS).write_text("".join(one.to_line() + "\n" for one in kept))
    (tmp_path / "steps.yaml").write_text(GRID)
    for name, path in {"STUDIES": "", "RECORDS": "records", "FIGURES": "figures"}.items():
        monkeypatch.setattr(studies, name, tmp_path / path)
    return "before\n<!-- study steps -->\nold\n<!-- end -->\nafter"


def test_differences_are_paired_with_the_first_row_and_the_best_row_is_on_top(page, tmp_path):
    """With intervals from six pairs on; a row that always has demonstrations is compared with the bare prompt."""
    rows = [line for line in studies.filled(page).splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| norm-tuning (max_steps=60) | 55.0 | 0.900 | 0.125 | – | – | – | 30 s |",
        "| zero-shot | 59.0 | 0.700 | 0.125 | +4.0 [+4.0, +4.0] | −0.200 [−0.200, −0.200] | 6 / 0 of 6 | 30 s |",
        "| icl + demonstrations | 50.0 | 0.900 | 0.125 | 0.0 | 0.000 | 0 / 0 of 1 | 30 s |",
        "| norm-tuning | 52.0 | 1.000 | 0.125 | −2.0 | +0.100 | 0 / 5 of 5 | 30 s |",
    ]
    assert (tmp_path / "figures" / "study_steps_prompt.png").stat().st_size > 1000


def test_the_rest_of_the_page_stays_and_a_second_run_changes_nothing(page):
    filled = studies.filled(page)
    assert filled.startswith("before\n<!-- study steps -->\n")
    assert filled.endswith("<!-- end -->\nafter")
    assert "old" not in filled
    assert studies.filled(filled) == filled


def test_a_study_without_records_has_its_command_and_no_table(page, tmp_path):
    (tmp_path / "records" / "steps" / RESULTS).unlink()
    filled = studies.filled(page)
    assert "ofa compare --config studies/steps.yaml --out studies/records/steps" in filled
    assert "| norm-tuning" not in filled


def test_each_number_of_shots_has_its_table(page, tmp_path):
    """Draws of two numbers of shots are never paired or averaged."""
    more = [record("norm-tuning", {"max_steps": 60}, "a", 1, 0.9, 0.1, shots=10)]
    more += [record("norm-tuning", {}, "a", 1, 0.8, 0.2, shots=10)]
    with (tmp_path / "records" / "steps" / RESULTS).open("a") as file:
        file.write("".join(one.to_line() + "\n" for one in more))
    filled = studies.filled(page)
    assert "Nothing in front of a text, 10 shots per class, 1 draws:" in filled
    assert "| norm-tuning (max_steps=60) | 55.0 | 0.900 |" in filled
    assert "| norm-tuning | 80.0 | 0.200 | 0.125 | −10.0 | +0.100 | 0 / 1 of 1 | 30 s |" in filled


def test_seeds_that_nothing_was_chosen_by_have_a_table_of_their_own_and_one_by_task(page, monkeypatch):
    """Only their draws count in it; by task there are all seeds, for rows with every task."""
    monkeypatch.setattr(studies, "UNSEEN", {"steps": frozenset({2, 3})})
    text = studies.filled(page)
    fresh = text.split("Of these, seeds 2 to 3, 4 draws:")[1].split("Points by task")[0]
    assert "| norm-tuning | 51.3 | 1.000 | 0.125 | −2.0 | +0.100 | 0 / 3 of 3 | 30 s |" in fresh
    by_task = text.split("Points by task")[1]
    assert "| | a | b | all, whole tasks resampled |" in by_task
    assert "| norm-tuning | −2.0 ± 0.0 | −2.0 ± 0.0 | −2.0 [−2.0, −2.0] |" in by_task
    assert "icl" not in by_task
