"""`benchmarks.attaching` run small: its counts are exact and checked."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import attaching

SEQUENCES, TOKENS = 2, 8
WIDTH, BRANCHES = 64, 6
"""Channels of the tiny model's stream."""


@pytest.fixture(scope="module")
def rows(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], float]:
    """The table of a small run: value by part, variant, metric and whether checkpoints were on."""
    out = tmp_path_factory.mktemp("attaching") / "table.csv"
    size = ["--sequences", str(SEQUENCES), "--tokens", str(TOKENS), "--vocabulary", "300"]
    attaching.main(["--out", str(out), "--model", str(tiny_folder), "--rounds", "2", *size])
    with out.open() as file:
        table = list(csv.DictReader(file))
    return {(row["part"], row["variant"], row["metric"], row["checkpointing"]): float(row["value"]) for row in table}


def test_nothing_is_attached_where_nothing_is_weighted(rows: dict[tuple[str, ...], float]) -> None:
    """With both terms off there are no hooks, and so no cost; the step ratio alone has some."""
    hooks = {variant: rows["overhead", variant, "hooks", "False"] for variant in attaching.OVERHEAD}
    assert hooks["both_off"] == hooks["plain_again"] == 0
    assert hooks["step_ratio"] > 0


def test_bytes_are_counted_to_the_byte(rows: dict[tuple[str, ...], float]) -> None:
    """The step ratio saves each branch's update in float32, and otherwise only numbers per row.

    The sharpness keeps nothing, with a gradient in P.
    """
    saved = {variant: rows["memory", variant, "saved_bytes", "False"] for variant in attaching.MEASURED}
    updates = BRANCHES * SEQUENCES * TOKENS * WIDTH * 4
    # Lengths and ratios: some float32 numbers per step, sequence and token.
    assert 0 <= saved["step_ratio"] - saved["plain"] - updates <= 16 * 4 * BRANCHES * SEQUENCES * TOKENS
    assert saved["step_ratio"] == saved["exact"] == saved["hutchinson_n1"] == saved["hutchinson_n4"]


def test_checkpoints_lower_the_peak_of_every_variant(rows: dict[tuple[str, ...], float]) -> None:
    """Layers are then kept one at a time; with few layers, the cheapest variants gain little."""
    peaks = {on: {v: rows["memory", v, "peak_bytes", on] for v in attaching.MEASURED} for on in ("True", "False")}
    assert all(peaks["True"][variant] < peaks["False"][variant] for variant in attaching.MEASURED)


def test_the_peak_is_the_most_at_a_time() -> None:
    """Without memory that was freed or allocated before."""
    there = torch.empty(1 << 22, dtype=torch.uint8)

    def call() -> None:
        first = torch.empty(1 << 21, dtype=torch.uint8)
        del first
        _kept = torch.empty(1 << 20, dtype=torch.uint8), torch.empty(1 << 19, dtype=torch.uint8)

    assert attaching.peak_bytes(call, there) == 1 << 21


def test_every_estimator_is_attached_and_closed(rows: dict[tuple[str, ...], float]) -> None:
    """Milliseconds of all estimators, with the model restored each time."""
    for variant in attaching.ATTACHED:
        assert 0 < rows["attach", variant, "attach_and_close_median", "False"] < 10_000
