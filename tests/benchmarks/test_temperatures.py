"""Temperatures of trained models: each method is fitted once, and measured at every temperature."""

from __future__ import annotations

import json

import pytest

from benchmarks import temperatures
from benchmarks.temperatures import Line


def test_a_temperature_moves_the_likelihood_and_a_second_run_computes_nothing(tiny_folder, tmp_path, monkeypatch):
    page, out = tmp_path / "page.md", tmp_path / "draws.jsonl"
    page.write_text("before\n<!-- temperatures -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    sizes = ["--shots", "2", "--test-size", "4", "--max-steps", "1", "--dtype", "float32"]
    run = ["--model", str(tiny_folder), "--tasks", "reviews", *sizes, "--out", str(out), "--page", str(page)]
    temperatures.main(run)
    (found,) = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert found["likelihood"].keys() == temperatures.ROWS.keys()
    assert all(len(set(part)) == len(temperatures.TEMPERATURES) for part in found["likelihood"].values())
    filled = page.read_text(encoding="utf-8")
    assert "old" not in filled
    assert "| LoRA |" in filled
    monkeypatch.setattr(temperatures, "measured", lambda *_: pytest.fail("computed again"))
    temperatures.main(run)
    assert page.read_text(encoding="utf-8") == filled


def test_the_gain_is_of_one_and_a_half_against_one_with_an_interval_from_six_draws():
    def line(seed):
        rows = temperatures.ROWS
        losses = {row: [0.7, 0.5, 0.6] for row in rows}
        return Line("m", "float32", "t", seed, 5, 200, dict.fromkeys(rows, 0.8), losses, losses, "0")

    lines = [line(seed) for seed in range(6)]
    row = "| LoRA | 80.0 | 0.700 | 0.500 | 0.600 | 0.700 | 0.500 | 0.600 | −0.200"
    assert f"{row} [−0.200, −0.200] | 6 of 6 |" in temperatures.table(lines)
    assert f"{row} | 5 of 5 |" in temperatures.table(lines[:5])
