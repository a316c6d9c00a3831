"""The kernels' benchmark: a table on any machine, of implementations with right results."""

from __future__ import annotations

import csv
import os
from dataclasses import replace

import pytest
import torch

from benchmarks import kernels
from benchmarks.implementations import Case, Implementation, passes

CPU = torch.device("cpu")
HEADER = "benchmark,variant,rows,width,samples,dtype,metric,value,unit,device,torch,triton,commit"
METRICS = {"time_median", "time_p20", "time_p80", "bandwidth", "copy_share", "time_ratio"}

over_passes = pytest.mark.parametrize("one", passes((1, 2)), ids=lambda one: one.label)


def read(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_cpu_times_the_reference_of_every_operation(tmp_path):
    out = tmp_path / "results" / "kernels.csv"
    kernels.main(f"--out {out} --widths 64 --rows 8 --samples 1 2 --repeats 2".split())
    assert out.read_text().startswith(HEADER + "\n")
    copied, *rows = read(out)
    assert (copied["benchmark"], copied["metric"]) == ("copy", "bandwidth")
    wanted = {(one.name, str(one.operation.samples)) for one in passes((1, 2))}
    for benchmark, samples in wanted:
        found = [row for row in rows if (row["benchmark"], row["samples"]) == (benchmark, samples)]
        variants = {"eager", "library"} if benchmark.startswith(("norm_step", "add_norm")) else {"eager"}
        assert {(row["variant"], row["metric"]) for row in found} == {(v, m) for v in variants for m in METRICS}
    assert {(row["benchmark"], row["samples"]) for row in rows} == wanted
    assert all(float(row["value"]) > 0 for row in rows)


def test_only_what_is_asked_for_is_timed(tmp_path):
    out = tmp_path / "kernels.csv"
    choice = "--operations norm_step_forward contract_backward --dtypes fp32 --samples 3 --variants eager"
    kernels.main(f"--out {out} {choice} --widths 32 64 --rows 4 --repeats 2".split())
    _, *rows = read(out)
    found = {(row["benchmark"], row["variant"], row["dtype"], row["samples"], row["width"]) for row in rows}
    wanted = [("norm_step_forward", "eager", "fp32", "0"), ("contract_backward", "eager", "fp32", "3")]
    assert found == {(*one, width) for one in wanted for width in ("32", "64")}


@over_passes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_timed_computes_the_reference(one, dtype):
    case = Case(9, 96, dtype, CPU)
    for implementation in one.operation.implementations(CPU).values():
        assert kernels.relative_error(one, implementation, case) <= kernels.TOLERANCE[dtype]


@over_passes
def test_the_kernels_compute_the_reference(one):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels run on CPU tensors in the interpreter only")
    case = Case(5, 96, torch.float32, CPU)
    assert kernels.relative_error(one, one.operation.triton, case) <= kernels.TOLERANCE[torch.float32]


@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_wrong_results_are_refused(monkeypatch, tmp_path, capsys, factor):
    """Its error is written instead of its times; the others are timed."""

    def wrong(residual, update, weight):
        stream, normalized, length = first().operation.eager(residual, update, weight)
        return stream, factor * normalized, length

    rows = timed_with(wrong, monkeypatch, tmp_path)
    assert [row["metric"] for row in rows if row["variant"] == "library"] == ["error"]
    assert {row["metric"] for row in rows if row["variant"] == "eager"} == METRICS
    assert "library refused" in capsys.readouterr().err


def test_one_that_fails_does_not_take_the_others_with_it(monkeypatch, tmp_path, capsys):
    def failing(residual, update, weight):
        raise RuntimeError("no such device")

    assert {row["variant"] for row in timed_with(failing, monkeypatch, tmp_path)} == {"eager"}
    assert "no such device" in capsys.readouterr().err


def first():
    return passes(())[0]


def timed_with(library, monkeypatch, folder):
    """The table of the first pass, with this function instead of the library's."""
    changed = replace(first(), operation=replace(first().operation, library=library))
    monkeypatch.setattr(kernels, "passes", lambda samples: [changed])
    out = folder / "kernels.csv"
    kernels.main(f"--out {out} --widths 64 --rows 8 --repeats 2".split())
    return read(out)[1:]


@over_passes
def test_a_prepared_pass_can_be_called_again(one):
    call = Implementation(one.operation.eager).prepare(*one.draw(Case(3, 32, torch.float32, CPU)))
    assert all(torch.equal(before, after) for before, after in zip(call(), call(), strict=True))
