"""The sentences of a report follow from its numbers, and claim no more."""

from __future__ import annotations

import pytest

from ofa.report import verdicts
from ofa.report.content import build
from ofa.report.markdown import markdown
from ofa.report.page import page
from ofa.report.runs import Runs
from tests.ofa.report.synthetic import record, with_accuracy


def rows(seeds=range(6), task="sst2", **right):
    """Records of methods (underscores for dashes) with so many right answers of ten, or of ten by seed."""
    records = []
    for name, count in right.items():
        counts = count if isinstance(count, list) else [count] * len(seeds)
        for seed, one in zip(seeds, counts, strict=True):
            records.append(record(name.replace("_", "-"), {"prompt": with_accuracy(one)}, seed=seed, task=task))
    return records


def comparison(records):
    return build(records).comparisons[0]


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        (
            rows(lora=8, ia3=5),
            "Highest without demonstrations: lora, 80.0 ± 0.0 %, significantly better than the other row.",
        ),
        (
            rows(lora=[8, 5, 7, 6, 8, 8], ia3=[7, 6, 7, 7, 7, 7]),
            "Highest without demonstrations: lora, 70.0 ± 12.6 %; not significantly better than ia3.",
        ),
        (rows(lora=8), "Highest without demonstrations: lora, 80.0 ± 0.0 %, the only row with every task."),
        (
            rows(range(2), lora=8, ia3=5),
            "Highest without demonstrations: lora, 80.0 ± 0.0 %; 2 pairs of task and seed cannot tell rows apart.",
        ),
    ],
)
def test_the_best_row_is_named_with_those_not_significantly_below(records, sentence):
    """Six seeds suffice for an interval, two do not."""
    assert verdicts.best(comparison(records)) == [sentence]


def test_without_an_average_there_is_no_best_row():
    found = comparison(rows(task="a", lora=8) + rows(task="b", ia3=5))
    assert verdicts.best(found) == ["No method has a result on every task yet, so there is no average to compare."]


@pytest.mark.parametrize(
    ("norm_tuning", "ofa", "told"),
    [
        (7, 5, "With OFA's terms, norm tuning loses 20.0 points [−20.0, −20.0] without demonstrations."),
        (5, 7, "With OFA's terms, norm tuning gains 20.0 points [+20.0, +20.0] without demonstrations."),
        (
            7,
            [8, 6, 8, 6, 8, 6],
            "With OFA's terms, norm tuning changes by 0.0 points [−10.0, +6.7] without demonstrations "
            "(not significant).",
        ),
    ],
)
def test_the_effect_of_the_terms_is_a_sentence(norm_tuning, ofa, told):
    sentence = verdicts.terms(comparison(rows(norm_tuning=norm_tuning, ofa=ofa)))[0]
    assert sentence.split("[")[0] == told.split("[")[0]
    assert sentence.split("]")[1] == told.split("]")[1]


def test_the_effect_of_terms_without_a_common_draw_is_unknown():
    assert verdicts.terms(comparison(rows(range(2), ofa=5) + rows(range(2, 4), norm_tuning=5))) == [
        "The effect of OFA's terms is unknown: norm-tuning and ofa have no pair of task and seed in common."
    ]


def test_nothing_is_said_of_terms_that_were_not_compared():
    content = build(rows(lora=5, norm_tuning=5))
    assert verdicts.terms(content.comparisons[0]) == []
    assert "OFA's terms" not in markdown(content) + page(content).replace("&#39;", "'")


def test_a_grid_of_settings_is_counted_and_none_of_them_chosen():
    """The λ that is best on the test texts does not measure the effect of the terms."""
    records = rows(norm_tuning=6)
    for weight, right in ((0.1, 8), (0.2, 5), (0.3, 6)):
        records += [
            record("ofa", {"prompt": with_accuracy(right)}, seed=seed, settings={"sharpness": weight})
            for seed in range(6)
        ]
    assert verdicts.terms(comparison(records)) == [
        "Settings of OFA that differ significantly from norm-tuning: without demonstrations 1 better and 1 worse of 3."
    ]


def test_progress_counts_failures_and_what_is_still_to_come():
    records = [*rows(range(2), lora=8), record("ia3", None, seed=0, error="diverged")]
    content = build(records, Runs((), frozenset({"a cell", "another"})))
    assert verdicts.progress(content) == "2 of 6 cells finished, 1 failed, 3 not run"


def test_the_title_counts_methods_and_names_few_tasks():
    few = build(rows(task="a", lora=5, ia3=5) + rows(task="b", lora=5))
    many = build([one for task in "abcde" for one in rows(range(1), task=task, lora=5)])
    assert verdicts.title(few) == "2 methods on a and b"
    assert verdicts.title(many) == "1 method on 5 tasks"
