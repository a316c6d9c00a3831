"""The figure of README.md shows what the records hold: every method alone, and gains paired by draw."""

from __future__ import annotations

import pytest

from benchmarks import overview
from ofa.comparison.store import RESULTS
from tests.benchmarks.test_studies import record


@pytest.fixture
def rows(tmp_path):
    """Relative steps gain 0.1 on six draws and OFA on one; in-context learning has its shots always."""
    draws = range(1, 7)
    records = [record("norm-tuning", {"relative": False}, "a", seed, 0.02 * seed, 0.9) for seed in draws]
    records += [record("norm-tuning", {}, "a", seed, 0.02 * seed + 0.1, 0.9) for seed in draws]
    records += [record("ofa", {}, "a", 1, 0.6, 0.9), record("icl", {}, "a", 1, 0.3, 0.9, "demonstrations")]
    (tmp_path / RESULTS).write_text("".join(one.to_line() + "\n" for one in records))
    return overview.without_demonstrations(tmp_path)


def test_methods_stand_without_demonstrations_and_gains_are_paired(rows, tmp_path):
    means = {row.name: round(spread.mean, 3) for row, spread in overview.averages(rows).items()}
    assert means == {"norm-tuning (relative=False)": 0.07, "norm-tuning": 0.17, "ofa": 0.6, "icl": 0.3}
    [(row, difference)] = overview.gains(rows).items()  # one pair says nothing
    assert (row.name, difference.pairs, round(difference.mean, 6)) == ("norm-tuning", 6, 0.1)
    overview.figure(rows, {"chosen on": rows}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
