"""The GPU benchmarks also run small on a CPU, so that errors are found without a GPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    ceilings,
    curvature_kernels,
    every_kernel,
    gpu_profile,
    gpu_step,
    machine_code,
    tune_rows,
    tuning,
)
from ofa.training import graphed_step
from ofa_kernels import launch, workload
from ofa_kernels.ops import launching
from tests.device import DEVICE
from tests.recorder import Recorder

CPU = torch.device("cpu")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def read(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_both_ceilings_are_in_the_table(tmp_path):
    ceilings.main(["--out", str(tmp_path / "ceilings.csv")])
    found = {(row["benchmark"], row["unit"]): float(row["value"]) for row in read(tmp_path / "ceilings.csv")}
    assert set(found) == {("copy", "GB/s"), ("product", "TFLOP/s")}
    assert all(value > 0 for value in found.values())


def test_a_step_of_every_variant_is_timed_beside_plain(tmp_path):
    """All of them in bfloat16 with float32 scales, as on a GPU."""
    gpu_step.main(["--out", str(tmp_path / "step.csv"), "--rounds", "2"])
    rows = read(tmp_path / "step.csv")
    assert {row["variant"] for row in rows} == set(gpu_step.TIMED)
    ratios = {row["variant"]: float(row["value"]) for row in rows if row["metric"] == "time_ratio"}
    assert ratios.pop("plain") == 1
    assert all(ratio > 0 for ratio in ratios.values())


def test_fused_layers_are_timed_beside_plain_ones(tmp_path):
    gpu_step.main(["--what", "fused", "--out", str(tmp_path / "fused.csv"), "--rounds", "2"])
    rows = read(tmp_path / "fused.csv")
    assert {row["variant"] for row in rows} == set(gpu_step.FUSED_TIMED)
    ratios = {row["variant"]: float(row["value"]) for row in rows if row["metric"] == "fused_ratio"}
    assert ratios.pop("fused") == 1
    assert all(ratio > 0 for ratio in ratios.values())


def test_the_kernels_of_a_step_are_in_the_table_by_name(tmp_path):
    gpu_profile.main(["--out", str(tmp_path / "profile.csv")])
    rows = read(tmp_path / "profile.csv")
    assert {row["variant"] for row in rows} == set(gpu_profile.PROFILED)
    launches = {row["kernel"]: float(row["value"]) for row in rows if row["metric"] == "launches"}
    assert launches["aten::mm"] >= 1


def test_the_curvature_is_timed_beside_flash_attention(tmp_path):
    curvature_kernels.main(["--out", str(tmp_path / "curvature.csv"), "--repeats", "2"])
    rows = read(tmp_path / "curvature.csv")
    assert {row["benchmark"] for row in rows} == set(curvature_kernels.OPERATIONS)
    timed = {"time_median", "time_p20", "time_p80", "bandwidth", "copy_share"}
    assert {row["metric"] for row in rows} == {*timed, "flash_ratio"}
    assert all(float(row["value"]) > 0 for row in rows)


def test_a_wrong_curvature_is_refused_and_not_timed(tmp_path, monkeypatch, capsys):
    def wrong(*given):
        return 1.2 * curvature_kernels.reference.attention_trace(*given)

    own = curvature_kernels.implementations(CPU)["eager"]
    both = {"eager": own, "other": own | {"attention_trace": wrong}}
    monkeypatch.setattr(curvature_kernels, "implementations", lambda device: both)
    curvature_kernels.main(["--out", str(tmp_path / "curvature.csv"), "--repeats", "2"])
    rows = [row for row in read(tmp_path / "curvature.csv") if row["variant"] == "other"]
    found = [(row["metric"], row["value"]) for row in rows if row["benchmark"] == "attention_trace"]
    assert [(metric, round(float(value), 1)) for metric, value in found] == [("error", 0.2)]
    assert "attention_trace other refused: error 0.2" in capsys.readouterr().err


TUNED = ["--rows", "2", "--width", "128", "--repeats", "2"]


def test_every_launch_of_a_kernel_of_rows_is_timed_beside_its_own(tmp_path):
    """Every candidate's tiles, stages and number of programs give right results."""
    tune_rows.main(["--out", str(tmp_path / "rows.csv"), "--kernels", "norm_step_backward", *TUNED])
    rows = read(tmp_path / "rows.csv")
    assert {row["metric"] for row in rows} - {"spills"} == {"time_median"}
    assert [row["programs"] for row in rows if row["chosen"] == "1"] == ["0"], "the library's own, once"
    assert len(rows) == 1 + len(tune_rows.candidates("norm_step_backward", 128))
    assert {row["stages"] for row in rows} == {"1", "3"}, "the library's own is among the candidates'"


def test_a_launch_whose_results_are_wrong_is_refused_and_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune_rows, "relative_error", lambda *given: 0.2)
    monkeypatch.setattr(tune_rows, "candidates", lambda *given: [])
    tune_rows.main(["--out", str(tmp_path / "rows.csv"), "--kernels", "contract_forward", *TUNED])
    assert [(row["metric"], row["value"]) for row in read(tmp_path / "rows.csv")] == [("error", "0.2")]
    assert "refused: error 0.2" in capsys.readouterr().err


@pytest.mark.parametrize("kernel", tune_rows.KERNELS)
def test_a_candidate_decides_its_kernels_launch(kernel):
    """As captured by the compiling process; afterwards the library's own settings are restored."""
    before = launch.configure, launch.programs
    own = launch.configure(kernel, 256, 2, "sm_90")
    other = tune_rows.Candidate(next(one.launch for one in tune_rows.candidates(kernel, 256) if one.launch != own))
    one, case = tune_rows._pass(kernel), tune_rows.Case(4, 256, torch.bfloat16, CPU)
    with other.decides(kernel):
        call = lambda: one.operation.triton.prepare(*one.draw(case))()  # noqa: E731
        *_, keywords = tuning.captured(kernel, call, "sm_90")
    assert (keywords["num_warps"], keywords["GROUPS"]) == (other.launch.num_warps, other.launch.groups)
    assert (launch.configure, launch.programs) == before


def test_what_a_call_does_not_launch_is_said():
    with pytest.raises(LookupError, match="norm_step_forward is not launched"):
        tuning.captured("norm_step_forward", lambda: None, "sm_90")


def test_the_memory_checker_sees_every_kernel():
    """Every kernel of `ofa_kernels.workload`, which is compiled ahead of time, is launched here too."""
    ahead = [
        *workload.cases([64], ["fp32"], ["rms"], [1]),
        *workload.curvature_cases([64], ["bf16"], workload.VARIANTS),
    ]
    assert _launched(lambda: [case.launch() for case in ahead]) <= _launched(lambda: list(every_kernel.launch(CPU)))


def test_the_script_is_sound_shell_and_says_what_it_takes():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    told = subprocess.run(["bash", SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    assert "benchmarks/gpu.sh [OUT [PART...]]" in told


def test_a_part_that_there_is_not_is_refused(tmp_path):
    done = subprocess.run(["bash", SCRIPT, tmp_path / "out", "steps"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "benchmarks/gpu.sh: there is no part steps; the parts are ceilings works fused graphs step kernels launches "
        "curvature probes tests memcheck tune\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant", gpu_step.REPLAYED)
def test_a_replayed_step_has_the_gradients_of_an_eager_one(variant, monkeypatch):
    """With scales changed after the capture: the constants of the closed form are computed in the graph.

    Tolerance: half a unit of bfloat16, 2⁻⁹, in the two places where kernels with other tiles round a scale's gradient
    differently, and again in each of the four branches that it passes.
    """
    if DEVICE == "cpu":
        monkeypatch.setattr(graphed_step, "capture_for", lambda device: Recorder())
    workload = gpu_step.TINY.reshaped("small", hidden_size=128, intermediate_size=192, vocab_size=64).of(2, 64)
    model = gpu_step.build(workload, torch.device(DEVICE), torch.bfloat16)
    times, error = gpu_step.replayed(workload, model, variant, 2)
    assert len(times) == 2
    assert error <= 4 * 2 * 2**-9


@pytest.mark.skipif(DEVICE == "cuda", reason="says why there are no graphs on a CPU")
def test_steps_that_are_not_replayed_are_not_timed_as_if_they_were():
    workload = gpu_step.TINY
    with pytest.raises(RuntimeError, match="the model is on cpu"):
        gpu_step.replayed(workload, gpu_step.build(workload), "plain", 2)


def test_without_a_gpu_the_script_stops_in_one_sentence(tmp_path):
    hidden = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", SCRIPT, tmp_path / "out"], env=hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"benchmarks/gpu.sh: {sys.executable} finds no PyTorch with a CUDA GPU here;")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def _launched(run):
    names = set()
    with launching.launching_by(lambda kernel, *_: names.add(kernel.fn.__name__), "sm_90"):
        run()
    return names


def test_the_hosts_time_is_measured_on_kernels_without_a_gpu(tmp_path):
    """In a separate process, which cannot compute afterwards. A step that measures more launches more kernels."""
    command = [sys.executable, "-m", "benchmarks.host_time", "--rounds", "2", "--out", str(tmp_path / "host.csv")]
    subprocess.run(command, cwd=SCRIPT.parents[1], check=True, capture_output=True)
    rows = read(tmp_path / "host.csv")
    launches = {row["variant"]: float(row["value"]) for row in rows if row["metric"] == "launches"}
    assert 0 < launches["plain"] < launches["step_ratio"] <= launches["exact_every4"] < launches["exact"]
    assert {row["value"] for row in rows if (row["variant"], row["metric"]) == ("plain", "ratio")} == {"1.0"}


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;      /* 0x00000a0000017a02 */
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/              @!P0 BRA 0x20 ;
        /*0050*/               @P1 BRA 0x10 ;
        /*0060*/                   BRA 0x60;
"""
"""A loop at 0x20 inside one at 0x10, and the endless loop after every kernel."""


@pytest.mark.parametrize(
    ("over_rows", "instructions", "barriers"),
    [(True, 5 + 3 * 3, 2 + 3 * 1), (False, 7 + 3 * 3 + 3 * 5, 2 + 3 * 1 + 3 * 2)],
)
def test_what_is_in_a_loop_counts_as_often_as_it_is_met(over_rows, instructions, barriers):
    """Four samples: three more rounds of every loop except that over rows, outside which nothing counts."""
    code = machine_code.read(LISTING)
    assert code.loops == [(0x20, 0x40), (0x10, 0x50)]
    assert code.per_row(machine_code.is_any, 4, over_rows=over_rows) == instructions
    assert code.per_row(machine_code.is_barrier, 4, over_rows=over_rows) == barriers
