"""The rank correlation is within draws, and the control has its own runs."""

from __future__ import annotations

import pytest

from benchmarks import flatness
from ofa.comparison.records import Cell, Record, Score


def record(seed, flat, gap, **settings):
    cell = Cell("m", "task", "0", "ofa", seed, 5, 10, settings)
    score = Score({"negative_log_likelihood": 0.5 + gap}, (0,), (0,), 0.0, 0)
    end = {"sharpness": flat, "step_ratio": 1.0, "shots": {"negative_log_likelihood": 0.5}}
    return Record(cell, scores={"prompt": score}, notes={"at_the_end": end})


def test_ranks_are_compared_within_a_draw():
    """Seed 2 has another level of both; across the draws the order would be reversed."""
    weights = (0.1, 0.3, 1.0)
    kept = [record(1, 10 + i, 5 + i, sharpness=weight) for i, weight in enumerate(weights)]
    kept += [record(2, 100 + i, 1 + i, sharpness=weight) for i, weight in enumerate(weights)]
    kept += [record(1, 50 - i, i, sharpness=weight, control="permuted") for i, weight in enumerate(weights)]
    for kind, expected, draws in (("true", 1.0, 2), ("permuted", -1.0, 1)):
        found = flatness.runs(kept, kind)
        assert len(found) == draws
        mean, interval = flatness.correlation(list(found.values()))
        assert mean == pytest.approx(expected)
        assert (interval.low, interval.high) == pytest.approx((expected, expected))


def test_runs_without_a_weight_belong_to_both():
    kept = [record(1, 1.0, 1.0, sharpness=0.0), *(record(1, i, i, sharpness=i) for i in (2.0, 3.0))]
    assert [len(runs) for runs in flatness.runs(kept, "true").values()] == [3]
    assert flatness.runs(kept, "permuted") == {}
