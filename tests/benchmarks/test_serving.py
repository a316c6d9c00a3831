"""The latencies of adapters: the same request to models with the same answers, compared within a round."""

from __future__ import annotations

import csv

import pytest
import torch

from benchmarks import serving

# PEFT warns of every norm, and tunes it anyway.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")


def test_all_variants_of_all_workloads_are_in_the_table(tiny_folder, tmp_path):
    serving.main(["--model", str(tiny_folder), "--rounds", "2", "--out", str(tmp_path / "serving.csv")])
    with (tmp_path / "serving.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    names = {serving.BASE, serving.SECOND_BASE, serving.MERGED, serving.OFA, serving.PEFT}
    assert {row["variant"] for row in rows} == names
    assert len(rows) == len(serving.WORKLOADS) * len(names) * 10
    assert {row["value"] for row in rows if row["variant"] == serving.BASE and row["unit"] == "1"} == {"1.0"}
    assert all(float(row["value"]) > 0 for row in rows)


def test_models_that_answer_differently_are_not_compared(tiny_folder, tmp_path):
    """A merged checkpoint that lost the adapter would be as fast."""
    base, adapter, merged = serving.prepared(str(tiny_folder), "float32", tmp_path)
    models = serving.variants(base, adapter, merged, torch.float32, "cpu")
    serving.check_answers(models, torch.float32, "cpu")
    with pytest.raises(AssertionError):
        serving.check_answers({**models, serving.MERGED: models[serving.BASE]}, torch.float32, "cpu")


def test_a_ratio_is_taken_within_a_round():
    """A round in which the machine is ten times slower does not change the ratios."""
    base = [1.0, 10.0, 1.0, 2.0, 1.0]
    assert serving.ratio([1.5 * one for one in base], base) == (1.5, 1.5, 1.5)


def test_every_round_calls_everything_and_begins_elsewhere():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = serving.interleaved(calls, 3, "cpu")
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
