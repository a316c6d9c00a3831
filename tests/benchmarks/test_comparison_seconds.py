"""The seconds of a comparison's cells, by method and task; and the script for a GPU, as far as a CPU goes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks import comparison_seconds
from ofa.comparison.arguments import check_settings
from ofa.comparison.grid import Grid, checked_part
from ofa.comparison.store import RESULTS, read_records
from tests.ofa.comparison.conftest import write_task

KEPT = Path(comparison_seconds.__file__).parent / "results" / "comparison_cpu"
SCRIPT = Path(comparison_seconds.__file__).parent / "comparison_gpu.sh"


def table(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def values(rows):
    return {row["metric"]: float(row["value"]) for row in rows}


def test_every_method_and_task_has_its_median_and_range(tmp_path):
    """Of the committed comparison, against a plain count."""
    comparison_seconds.main([str(KEPT), "--out", str(tmp_path / "seconds.csv"), "--commit", "abc"])
    rows = table(tmp_path / "seconds.csv")
    assert len(rows) == 4 * 16 * 6
    shown = [row for row in rows if (row["task"], row["method"]) == ("trec", "lora (epochs=12)")]
    cells = [one for one in read_records(KEPT) if (one.cell.task, one.cell.method) == ("trec", "lora")]
    seconds, fits = (sorted(getattr(one, name) for one in cells) for name in ("seconds", "fit_seconds"))
    expected = dict(zip(("cell_min", "cell_median", "cell_max"), seconds, strict=True))
    expected |= dict(zip(("fit_min", "fit_median", "fit_max"), fits, strict=True))
    assert values(shown) == pytest.approx(expected, rel=1e-5)
    assert {(row["seeds"], row["device"], row["workers_per_gpu"]) for row in rows} == {("3", "cpu", "1")}
    assert {(row["torch"], row["transformers"], row["commit"]) for row in rows} == {("2.13.0+cpu", "5.23.0", "abc")}


def test_failed_cells_do_not_count_and_other_machines_are_rows_of_their_own(tmp_path):
    cells = [one for one in read_records(KEPT) if (one.cell.task, one.cell.method) == ("sst2", "ofa")]
    shared = replace(cells[0], seconds=1.0, versions={**cells[0].versions, "workers_per_gpu": "8"})
    records = [shared, replace(cells[1], seconds=2.0), replace(cells[2], error="it broke")]
    (tmp_path / RESULTS).write_text("".join(record.to_line() + "\n" for record in records))
    comparison_seconds.main([str(tmp_path), "--out", str(tmp_path / "seconds.csv")])
    rows = table(tmp_path / "seconds.csv")
    assert [(row["workers_per_gpu"], row["seeds"]) for row in rows[::6]] == [("8", "1"), ("1", "1")]
    assert [values(part)["cell_median"] for part in (rows[:6], rows[6:])] == [1.0, 2.0]


# The script


def script(*arguments, **environment):
    given = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", SCRIPT, *arguments], env=given, capture_output=True, text=True, check=False)


def test_the_script_runs_a_grid_and_leaves_results_report_and_seconds(tiny_folder, tmp_path):
    """None of them names a folder of the machine, except the model's."""
    write_task(tmp_path / "data" / "mood", "mood")
    write_task(tmp_path / "data" / "kind", "kind")
    options = "--methods zero-shot,icl --seeds 1-2 --shots 1 --test-size 4 --dtype float32"
    given = {"DEVICE": "cpu", "WORKERS": "1", "TASKS": "mood kind", "MODEL": str(tiny_folder), "OPTIONS": options}
    done = script(tmp_path / "data", tmp_path / "out", "120", **given)
    assert done.returncode == 0, done.stdout + done.stderr
    left = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert {one for one in left if not one.endswith(".lock")} == {
        *("comparison_cpu/results.jsonl", "comparison_cpu/run.json", "comparison_cpu.log"),
        *("report.md", "report.html", "comparison_seconds_cpu.csv"),
    }
    records = read_records(tmp_path / "out" / "comparison_cpu")
    assert [(one.cell.task, one.cell.method) for one in records[::2]] == [
        (task, method) for task in ("mood", "kind") for method in ("zero-shot", "icl")
    ]
    assert len(table(tmp_path / "out" / "comparison_seconds_cpu.csv")) == 4 * 6
    noted = (tmp_path / "out" / "comparison_cpu" / "run.json").read_text().replace(str(tiny_folder), "")
    assert str(tmp_path) not in noted


def test_what_compiles_the_kernels_is_a_grid_of_methods_that_the_comparison_has():
    """The script runs only on a GPU, where an error would first be found."""
    grids = [
        checked_part(Grid, {"tasks": "mood", **yaml.safe_load((SCRIPT.parent / name).read_text())})
        for name in ("compile_kernels.yaml", "comparison.yaml")
    ]
    methods = [{row.method for row in grid.methods} for grid in grids]
    assert methods[0] < methods[1]
    assert grids[0].dtype == grids[1].dtype
    for row in grids[0].methods:
        assert row.settings == {"epochs": 1}
        check_settings(row.method, row.settings)


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["data"], {}, "give DATA and OUT"),
        (["data", "out", "soon"], {}, "SECONDS is soon: give a whole number above 30"),
        (["data", "out"], {}, "finds no PyTorch with a CUDA GPU here"),
        (["data", "out"], {"DEVICE": "cpu"}, "data/*/task.json: DATA holds a folder for each task"),
        (["data", "out"], {"DEVICE": "cpu", "TASKS": "no"}, "data/no/task.json: DATA holds a folder for each task"),
    ],
)
def test_what_the_script_cannot_run_is_one_sentence(tmp_path, arguments, environment, words):
    (tmp_path / "data").mkdir()
    refused = script(*(tmp_path / one if one in ("data", "out") else one for one in arguments), **environment)
    assert refused.returncode == 2
    assert words in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_the_script_says_what_it_takes():
    assert "benchmarks/comparison_gpu.sh DATA OUT [SECONDS]" in script("--help").stdout
