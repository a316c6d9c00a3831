"""The content of a report: its rows, their baselines, and cells without a result."""

from __future__ import annotations

import pytest

from ofa.comparison.outcomes import baseline_of, by_row
from ofa.errors import InputError
from ofa.report.content import build
from ofa.report.runs import Runs
from tests.ofa.report.synthetic import record, with_accuracy

BOTH = ("prompt", "demonstrations")


def finished(method, right=5, *, contexts=("prompt",), **fields):
    return record(method, {context: with_accuracy(right) for context in contexts}, **fields)


def only(records, runs=None):
    content = build(records, runs) if runs else build(records)
    (comparison,) = content.comparisons
    return comparison


def labels(comparison):
    return [line.row.label for line in comparison.lines]


def test_with_and_without_demonstrations_are_rows_of_their_own():
    found = only([finished("ofa", contexts=BOTH), finished("icl", contexts=("demonstrations",)), finished("zero-shot")])
    assert sorted(labels(found)) == ["icl + demonstrations", "ofa", "ofa + demonstrations", "zero-shot"]


def test_rows_are_ordered_by_their_macro_average_and_those_without_one_come_last():
    """`half` is better on the one task it has, and has no average over both."""
    records = [finished("low", 4, task=task) for task in ("a", "b")]
    records += [finished("high", 6, task=task) for task in ("a", "b")]
    records += [finished("half", 9, task="a"), record("none", None, task="a", error="out of memory")]
    assert labels(only(records)) == ["high", "low", "half", "none"]


def test_failed_and_missing_cells_are_gaps():
    """A draw that another method has and this one has not is a gap; so is a failure, with its error."""
    records = [finished("full", seed=seed) for seed in (1, 2, 3)]
    records += [finished("part", seed=1), record("part", None, seed=2, error="diverged")]
    found = only(records)
    assert [(gap.name, gap.draw.seed, gap.error) for gap in found.gaps] == [("part", 2, "diverged"), ("part", 3, None)]
    assert found.cells == 6


def test_a_method_that_never_finished_keeps_its_row():
    found = only([finished("full"), record("broken", None, error="out of memory")])
    (broken,) = (line for line in found.lines if line.row.name == "broken")
    assert broken.macro is None
    assert broken.cost is None
    assert broken.accuracy == {}


def test_requested_cells_without_a_record_are_counted():
    """Requested by the run's note; the cell with a record and the gap of seed 2 do not count."""
    done, seed_2, later = (finished("a", seed=seed) for seed in (1, 2, 3))
    other = finished("b", seed=2)
    runs = Runs((), frozenset(one.cell.key for one in (done, seed_2, later)))
    content = build([done, other], runs)
    assert [(gap.name, gap.draw.seed, gap.key) for gap in content.comparisons[0].gaps] == [
        ("a", 2, seed_2.cell.key),
        ("b", 1, finished("b", seed=1).cell.key),
    ]
    assert content.waiting == 1


def test_models_are_never_compared_with_each_other():
    content = build([finished("norm-tuning", 5, model="one"), finished("ofa", 9, model="two")])
    assert [comparison.model for comparison in content.comparisons] == ["one", "two"]
    assert all(not line.contrasts for comparison in content.comparisons for line in comparison.lines)


def test_a_name_of_a_task_stands_for_one_task_only():
    """The same name with other shots, test examples or another file is another column, and named by what differs."""
    found = only(
        [
            finished("a", shots=5),
            finished("a", shots=1),
            finished("a", task="trec"),
            finished("a", shots=1, test_size=100),
        ]
    )
    assert sorted(found.names.values()) == [
        "sst2 (1 shot, 100 tests)",
        "sst2 (1 shot, 500 tests)",
        "sst2 (5 shots, 500 tests)",
        "trec",
    ]


def settings_rows(*rows):
    records = [record(method, {"prompt": with_accuracy(5)}, settings=settings) for method, settings in rows]
    return {row.name: row for row in by_row(records)}


@pytest.mark.parametrize(
    ("row", "baseline"),
    [
        ("lora", "norm-tuning"),
        ("ofa (sharpness=0.1)", "norm-tuning"),
        ("ofa (epochs=20, sharpness=0.1)", "norm-tuning (epochs=20)"),
        ("norm-tuning (epochs=20)", "norm-tuning (epochs=20)"),
    ],
)
def test_the_baseline_of_a_row_shares_its_settings(row, baseline):
    rows = settings_rows(
        ("norm-tuning", {}),
        ("norm-tuning", {"epochs": 20}),
        ("lora", {}),
        ("ofa", {"sharpness": 0.1}),
        ("ofa", {"sharpness": 0.1, "epochs": 20}),
    )
    assert baseline_of(rows[row], rows.values(), "norm-tuning").name == baseline


def test_a_baseline_has_no_settings_of_its_own():
    """Comparing zero-shot with one arbitrary λ of a grid would mislead."""
    rows = settings_rows(("ofa", {"sharpness": 0.1}), ("ofa", {"sharpness": 0.2}), ("lora", {}))
    assert baseline_of(rows["lora"], rows.values(), "ofa") is None


def test_fewer_seeds_do_not_compete_for_the_first_place():
    """One lucky seed is not compared with an average over two."""
    records = [finished("steady", 6, seed=seed) for seed in (1, 2)] + [finished("lucky", 9, seed=1)]
    assert only(records).winner("prompt").line.row.name == "steady"


def test_a_result_without_an_accuracy_is_refused_in_one_sentence():
    damaged = finished("ofa")
    del damaged.scores["prompt"].metrics["accuracy"]
    with pytest.raises(InputError, match=r"^the result of ofa on sst2 with seed 42 has no accuracy: .*[^.]$"):
        build([damaged])
