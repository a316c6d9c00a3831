"""The throughput of a pool: three ways to the same answers, compared within a round."""

from __future__ import annotations

import csv

from benchmarks import pool


def test_all_variants_are_in_the_table(tiny_folder, tmp_path):
    sizes = ["--rows", "3", "--tokens", "5", "--rounds", "2"]
    pool.main(["--model", str(tiny_folder), *sizes, "--out", str(tmp_path / "pool.csv")])
    with (tmp_path / "pool.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["variant"] for row in rows] == [name for name in (pool.ONE, pool.POOL, pool.SWITCHING) for _ in "1234"]
    assert {row["value"] for row in rows if row["variant"] == pool.ONE and row["unit"] == "1"} == {"1.0"}
    assert all(float(row["value"]) > 0 for row in rows)
