"""The figure of README.md shows what the records hold: every method alone, and OFA paired with norm tuning."""

from __future__ import annotations

import pytest

from benchmarks import overview
from ofa.comparison.store import RESULTS
from tests.benchmarks.test_studies import record


@pytest.fixture
def rows(tmp_path):
    """OFA is 0.1 above norm tuning on the two draws that both have; in-context learning has its shots always."""
    records = [record("norm-tuning", {}, "a", seed, 0.5 + 0.1 * seed, 0.9) for seed in (1, 2, 3)]
    records += [record("ofa", {}, "a", seed, 0.6 + 0.1 * seed, 0.9) for seed in (1, 2)]
    records += [record("icl", {}, "a", 1, 0.3, 0.9, "demonstrations")]
    (tmp_path / RESULTS).write_text("".join(one.to_line() + "\n" for one in records))
    return overview.without_demonstrations(tmp_path)


def test_methods_stand_without_demonstrations_and_ofa_against_norm_tuning(rows, tmp_path):
    means = {row.method: round(spread.mean, 3) for row, spread in overview.averages(rows).items()}
    assert means == {"norm-tuning": 0.7, "ofa": 0.75, "icl": 0.3}
    [(row, difference)] = overview.terms(rows).items()
    assert (row.method, difference.pairs, round(difference.mean, 6)) == ("ofa", 2, 0.1)
    overview.figure(rows, rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
