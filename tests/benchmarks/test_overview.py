"""The figure of README.md shows what the records hold: gains over norm tuning, paired by draw."""

from __future__ import annotations

from benchmarks import overview
from ofa.comparison.outcomes import by_row
from tests.benchmarks.test_studies import record


def test_gains_are_paired_with_one_step_size(tmp_path):
    """Relative steps gain 0.1 on six draws, LoRA on the one that it shares; other rows are not drawn."""
    draws = range(1, 7)
    records = [record("norm-tuning", {"relative": False}, "a", seed, 0.02 * seed, 0.9) for seed in draws]
    records += [record("norm-tuning", {"learning_rate": 0.01}, "a", seed, 0.02 * seed + 0.1, 0.9) for seed in draws]
    records += [record("lora", {}, "a", 1, 0.6, 0.9), record("lora", {}, "b", 1, 0.0, 0.9)]
    records += [record("ia3", {}, "a", 1, 0.3, 0.9)]
    gained = overview.gains(by_row(records))
    assert {name: (round(gain.mean, 6), gain.pairs) for name, gain in gained.items()} == {
        "ofa fit: relative steps of 1e-2": (0.1, 6),
        "LoRA": (0.58, 1),
    }
    overview.figure(gained, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
