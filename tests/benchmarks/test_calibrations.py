"""Calibrations of shared models: those of `ofa fit`, computed once, and against the default by draw."""

from __future__ import annotations

import json

import pytest

import ofa
from benchmarks import calibrations
from benchmarks.calibrations import Line


def test_the_kinds_are_those_of_fit_and_a_second_run_computes_nothing(tiny_folder, tmp_path, monkeypatch):
    """The models of the folds serve both kinds with a temperature."""
    page, out = tmp_path / "page.md", tmp_path / "draws.jsonl"
    page.write_text("before\n<!-- calibrations -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    sizes = ["--shots", "2", "--test-size", "4", "--max-steps", "1", "--dtype", "float32"]
    run = ["--model", str(tiny_folder), "--tasks", "reviews", *sizes, "--out", str(out), "--page", str(page)]
    calibrations.main(run)
    (found,) = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    loaded = ofa.load_model(str(tiny_folder), device="cpu")
    for kind in calibrations.KINDS:
        fitted = ofa.adapt(loaded.model, loaded.tokenizer, "reviews", 2, 42, max_steps=1, calibrate=kind)
        made = fitted.predictor.scorer.calibration
        assert found["temperatures"][kind] == (made.temperature if made else 1.0)
        fitted.close()
    filled = page.read_text(encoding="utf-8")
    assert "old" not in filled
    assert "| both |" in filled
    monkeypatch.setattr(calibrations, "measured", lambda *_: pytest.fail("computed again"))
    calibrations.main(run)
    assert page.read_text(encoding="utf-8") == filled


def test_less_is_better_and_six_draws_have_an_interval():
    def line(seed, none):
        losses = {**dict.fromkeys(calibrations.KINDS, 0.5), "none": none}
        measures = {kind: dict.fromkeys(calibrations.MEASURED, loss) for kind, loss in losses.items()}
        return Line("m", "float32", "t", seed, 5, 200, dict.fromkeys(losses, 1.0), measures, 1.0, 5.0, "0")

    lines = [line(seed, 0.6) for seed in range(6)]
    whole = calibrations.table(lines)
    assert "| none | 1.00 to 1.00 | 60.0 | 0.600 | 0.600 | 0.600 | +0.100 [+0.100, +0.100] | 0 / 6 |" in whole
    assert "[" not in calibrations.table(lines[:5])
