"""Suggested texts against random ones: a second run computes only what is missing, and the table pairs the draws."""

from __future__ import annotations

import json

import pytest

from benchmarks import suggesting
from benchmarks.suggesting import Line


def line(task, seed, suggested, random):
    accuracy = {suggesting.SHOTS: 0.5, suggesting.SUGGESTED: suggested, suggesting.RANDOM: random}
    return Line("m", task, seed, 2, 10, 200, accuracy, accuracy, {}, "0")


def test_a_second_run_computes_nothing_and_fills_the_page(tiny_folder, tmp_path, monkeypatch):
    page, out = tmp_path / "page.md", tmp_path / "draws.jsonl"
    page.write_text("before\n<!-- suggesting -->\nold\n<!-- end -->\nafter\n")
    sizes = ["--seeds", "1", "--add", "3", "--test-size", "4", "--max-steps", "1"]
    run = ["--model", str(tiny_folder), "--tasks", "reviews", *sizes, "--out", str(out), "--page", str(page)]
    suggesting.main(run)
    (found,) = map(json.loads, out.read_text().splitlines())
    assert sum(found["classes"][suggesting.SUGGESTED].values()) == 3
    assert sum(found["classes"][suggesting.RANDOM].values()) == 3
    assert found["accuracy"].keys() == {suggesting.SHOTS, suggesting.SUGGESTED, suggesting.RANDOM}
    filled = page.read_text()
    assert "old" not in filled
    assert "| reviews |" in filled
    monkeypatch.setattr(suggesting, "measured", lambda *_: pytest.fail("computed again"))
    suggesting.main(run)
    assert page.read_text() == filled


def test_differences_are_paired_by_draw_with_an_interval_from_six_on():
    lines = [line(task, seed, 0.6 + seed / 100, 0.6) for task in "ab" for seed in (1, 2, 3)]
    *_, whole = suggesting.table(lines).splitlines()
    assert whole == "| all | 50.0 | 62.0 | 60.0 | +2.0 [+1.3, +2.7] | 6 / 0 of 6 draws |"
    assert "[" not in suggesting.table(lines[:3])
