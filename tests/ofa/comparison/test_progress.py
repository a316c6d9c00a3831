"""Progress of a run: counts, and an estimate from the most similar cells."""

from __future__ import annotations

import pytest

from ofa.comparison import progress
from ofa.comparison.progress import Estimate, Expectation, Tally, in_words, shown
from ofa.comparison.records import Cell, Record, Score


def cell(method="ofa", task="mood", seed=1, **settings):
    return Cell("m", task, "0", method, seed, 5, 4, settings)


def done(seconds, **values):
    return Record(cell(**values), scores={"prompt": Score({"accuracy": 0.75}, (), (), 0.0, 0)}, seconds=seconds)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (cell(seed=9), 3.0),  # the same row on the same task, other seeds
        (cell(sharpness=0.1), 8.0),
        (cell(task="kind"), (2 + 4 + 8 + 30) / 4),  # the same method
        (cell("icl"), 1.0),
        (cell("lora"), None),
        (Cell("other", "mood", "0", "ofa", 1, 5, 4), None),
    ],
)
def test_a_cell_is_expected_to_take_as_long_as_those_most_like_it(wanted, expected):
    """Failed cells, which may have ended at once, do not count."""
    records = [
        done(2, seed=1),
        done(4, seed=2),
        done(8, sharpness=0.1),
        done(30, task="trec"),
        done(1, method="icl"),
        Record(cell(seed=9), error="no", seconds=1000),
    ]
    assert Expectation(records).seconds(wanted) == expected


def test_a_tally_counts_and_estimates(monkeypatch):
    """Three of four cells left, one of them half over, on two workers: (10 + 10 + 5) / 2 seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    cells = [cell(seed=seed) for seed in range(4)]
    tally = Tally(cells, [], workers=2)
    assert str(tally) == "0 of 4 done, 0 failed, 4 left, unknown time"
    tally.started(cells[0])
    tally.started(cells[1])
    assert tally.under_way == cells[:2]
    tally.finished(done(10, seed=0))
    now[0] += 5
    assert tally.estimate() == Estimate(12.5, unknown=0)
    assert str(tally) == "1 of 4 done, 0 failed, 3 left, about 12 s"
    tally.finished(Record(cells[1], error="no"))
    assert str(tally) == "1 of 4 done, 1 failed, 2 left, about 10 s"
    now[0] += 1000
    tally.started(cells[2])
    now[0] += 1000
    assert tally.estimate().seconds == 5.0, "a cell that takes longer than expected takes no time back"
    tally.started(cells[3])
    for one in cells[2:]:
        tally.finished(done(10, seed=one.seed))
    assert str(tally) == "3 of 4 done, 1 failed, 0 left"


def test_cells_of_earlier_runs_tell_the_time_before_the_first_is_done():
    """A method without timings is not counted, which the estimate shows."""
    tally = Tally([cell(seed=5), cell("lora")], [done(60)], workers=1)
    assert tally.estimate() == Estimate(60, unknown=1)
    assert str(tally).endswith("2 left, more than 60 s")


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (9.96, "10.0 s"), (12, "12 s"), (100, "2 min"), (7200, "2.0 h")]
)
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words


def told(terminal, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm" if terminal else "dumb")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    else:
        monkeypatch.delenv("FORCE_COLOR", raising=False)
    tally = Tally([cell(seed=0), cell(seed=1)], [], workers=1)
    with shown(tally) as view:
        for seed, record in ((0, done(1.5, seed=0)), (1, Record(cell(seed=1), error="it [broke]"))):
            view.started(cell(seed=seed))
            view.finished(record)
        view.say("that was all")
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_without_a_terminal_there_is_a_plain_line_for_each_cell(monkeypatch, capsys):
    """Without wrapping or control characters, for logs."""
    assert told(False, monkeypatch, capsys).splitlines() == [
        "ofa: mood, ofa, seed 0: accuracy 0.750 (prompt) in 1.5 s (1 of 2 done, 0 failed, 1 left, about 1.5 s)",
        "ofa: mood, ofa, seed 1: failed: it [broke] (1 of 2 done, 1 failed, 0 left)",
        "ofa: that was all",
    ]


def test_a_terminal_has_a_line_that_stays_up_to_date(monkeypatch, capsys):
    shown_there = told(True, monkeypatch, capsys)
    assert "accuracy 0.750 (prompt)" in shown_there
    assert "it [broke]" in shown_there
    assert "\x1b[" in shown_there, "drawn over, not appended"
