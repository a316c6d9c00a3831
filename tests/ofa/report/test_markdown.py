"""The Markdown report: its numbers, and escaped text."""

from __future__ import annotations

import pytest

from ofa.report import MARKDOWN, build
from ofa.report.markdown import markdown
from ofa.report.runs import Runs
from tests.ofa.report.synthetic import record, with_accuracy


def small(**fields):
    """Norm tuning 6, 8 and OFA 5, 5 of ten on two seeds; the third seed of OFA failed."""
    records = [
        record(method, {"prompt": with_accuracy(right, latency=0.02)}, seed=seed, fit_seconds=time, **fields)
        for method, time, counts in (("norm-tuning", 10.0, (6, 8)), ("ofa", 15.0, (5, 5)))
        for seed, right in enumerate(counts)
    ]
    return [*records, record("ofa", None, seed=2, error="the loss is not a number", **fields)]


def test_the_tables_hold_what_was_computed_by_hand():
    """70 ± 14.1: deviations ∓10 points, √(200 / 1); the difference of the means is −20; 15 s are 1.5 times 10 s."""
    lines = markdown(build(small(), Runs(("ofa compare --out results",)))).splitlines()
    assert lines[0] == "# 2 methods on sst2"
    assert "| norm-tuning | **70.0 ± 14.1 (2)** | 10 s | 20 ms | 0 | 0 B |" in lines
    assert "| norm-tuning | **70.0 ± 14.1 (2)** | **70.0 ± 14.1 (2)** | 63.0 ± 12.7 (2) | 1.0 | 2/3 |" in lines
    assert "| ofa | 50.0 ± 0.0 (2) | 50.0 ± 0.0 (2) | 45.0 ± 0.0 (2) | 2.0 | 2/3 |" in lines
    assert r"| ofa | −20.0 | \[−30.0, −10.0\] | 0 | 0 | 2 | 1.50 × |" in lines
    assert "| ofa | sst2 | 2 | 1 | failed: the loss is not a number |" in lines
    assert "| norm-tuning | sst2 | 2 | 1 | not run |" in lines
    assert "ofa compare --out results" in lines
    assert "| torch | 2.13.0 |" in lines


def test_a_report_of_a_realistic_size_has_every_row(content, report_folder):
    text = (report_folder / MARKDOWN).read_text(encoding="utf-8")
    results = text.split("### All results")[1].split("###")[0]
    assert len(content.comparisons[0].lines) == 27
    for line in content.comparisons[0].lines:
        assert f"| {line.row.label} |" in results


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("a|b", r"a\|b"),
        ("<b>x</b>", r"\<b\>x\</b\>"),
        ("two\nlines", "two lines"),
        ("[x](javascript:y)", r"\[x\](javascript:y)"),
        ("`*_~$&#\\", r"\`\*\_\~\$\&\#\\"),
    ],
)
def test_names_are_escaped(name, written):
    text = markdown(build([record("ofa", {"prompt": with_accuracy(5)}, task=name)]))
    assert f"| {written} |" in text.split("### All results\n\n")[1].splitlines()[0]


@pytest.mark.parametrize(("device", "told"), [("cpu", False), ("NVIDIA H100", True)])
def test_seconds_of_different_devices_have_a_note(device, told):
    records = [
        record(method, {"prompt": with_accuracy(5)}, versions={"device": where})
        for method, where in (("ofa", "cpu"), ("lora", device))
    ]
    assert ("different devices" in markdown(build(records))) == told


def test_warnings_of_methods_are_listed():
    notes = {"warnings": ["two labels share their first token"], "truncated_texts": 3}
    records = [
        record(name, {"prompt": with_accuracy(5)}, seed=seed, notes=notes)
        for name in ("ofa", "lora")
        for seed in (1, 2)
    ]
    text = markdown(build(records))
    assert "| ofa and lora | 4 | two labels share their first token |" in text
    assert "| ofa and lora | 4 | texts were cut to fit the model's window |" in text


def test_the_examples_are_counted_that_were_tested():
    """A task with fewer examples than the test size is tested on all of them."""
    text = markdown(build([record("ofa", {"prompt": with_accuracy(5, of=8)}, test_size=500)]))
    assert "8 test texts per task" in text


def test_a_command_cannot_end_its_own_block():
    text = markdown(build(small(), Runs(("ofa compare '```'",))))
    assert "````bash\nofa compare '```'\n````" in text
