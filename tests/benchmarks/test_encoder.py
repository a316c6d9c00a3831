"""The baseline of a sentence encoder writes records like `ofa compare`, and runs no cell twice."""

from __future__ import annotations

import sys

import torch

from benchmarks import encoder
from ofa.comparison.store import read_records

GRID = "tasks: [reviews]\nseeds: 1-2\nshots: 2\ntest_size: 20\nmethods: [zero-shot]\n"


def test_cells_are_recorded_once_and_say_what_the_classifier_says(tmp_path, monkeypatch):
    embedded = []

    def embed(texts):
        embedded.extend(texts)
        return torch.tensor([[len(text), text.count("e"), text.count(" ")] for text in texts], dtype=torch.float32)

    (tmp_path / "grid.yaml").write_text(GRID)
    monkeypatch.setattr(encoder, "encoder", lambda folder: embed)
    monkeypatch.setattr(sys, "argv", ["encoder", "a-model", str(tmp_path / "grid.yaml"), str(tmp_path / "out")])
    encoder.main()
    first, second = read_records(tmp_path / "out")
    assert (first.cell.method, first.cell.task, first.cell.seed, second.cell.seed) == ("encoder", "reviews", 1, 2)
    score = first.scores["prompt"]
    hits = sum(said == true for said, true in zip(score.predictions, score.truth, strict=True))
    assert score.accuracy == hits / 20
    assert first.trainable_parameters == 2 * (3 + 1)
    assert len(embedded) == 20 + 4 + 4
    encoder.main()
    assert len(embedded) == 28
