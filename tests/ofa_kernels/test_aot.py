"""Compiling for GPUs on a machine without one, and the resources of the compiled kernels."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ofa_kernels import aot, launch
from ofa_kernels.ops import launching
from ofa_kernels.resources import Usage
from tests.once import made_once

ROOT = Path(aot.__file__).parent.parent
TESTED = ("sm_80", "gfx942")
"""The least shared memory, and the other vendor."""

ROWS = ["--width", "576", "--dtype", "bf16", "--samples", "1"]
FEW = [*ROWS, "--norm", "layer+bias", "--head", "128", "--variant", "normed", "shifted"]
"""The heaviest launches of a row, and attention with the most sums; `python -m ofa_kernels.aot` compiles them all."""

ROW_KERNELS = {
    f"{name}_{way}" for name in ("norm_step", "perturb", "displace", "contract") for way in ("forward", "backward")
}
ROW_KERNELS |= {"probed_diagonal_rows"}
CURVATURE = {f"attention_curvature_{part}" for part in ("queries", "keys", "sums")}
CURVATURE |= {"mlp_curvature_tokens", "add_partials", "image_rows"}
CURVATURE |= {f"{name}_tiles" for name in ("mlp_diagonal", "attention_trace", "attention_diagonal")}


def run(*command, cwd=ROOT, **variables):
    """A process that compiles kernels, without Triton's interpreter and with a cache of the tests' own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=500
    )


@pytest.fixture(scope="module")
def built(request):
    """A folder with the table of everything compiled for two architectures, and Triton's cache of it."""

    def build(folder):
        architectures = [word for name in TESTED for word in ("--arch", name)]
        command = ["-m", "ofa_kernels.aot", *architectures, *FEW, "--csv", str(folder / "table.csv")]
        result = run(*command, TRITON_CACHE_DIR=folder / "cache")
        assert result.returncode == 0, result.stderr
        assert "registers" in result.stdout

    return made_once(request, "aot", build)


@pytest.fixture(scope="module")
def compiled(built):
    """The rows of the command's table."""
    with (built / "table.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("architecture", TESTED)
def test_every_kernel_compiles_for_every_architecture(compiled, architecture):
    assert {row["kernel"] for row in compiled if row["architecture"] == architecture} == ROW_KERNELS | CURVATURE


@pytest.mark.parametrize("architecture", TESTED)
def test_machine_code(compiled, architecture):
    """16-byte accesses, no float64, enough shared memory; only scalars per row have narrower accesses.

    Exceptions: curvature kernels have blocks of scalars, and AMD's chips read some operands in a product's order.
    """
    for row in (row for row in compiled if row["architecture"] == architecture):
        assert int(row["wide"]) > 0, row
        assert int(row["float64"]) == 0, row
        assert int(row["spills"]) <= aot.FEW_SPILLS, row
        assert int(row["narrow"]) <= 4 or row["kernel"] not in ROW_KERNELS, row
        assert int(row["shared"]) <= launch.SHARED[architecture], row


def test_an_unknown_architecture_is_refused_in_one_sentence(capsys):
    assert aot.main(["--arch", "sm_90", "--arch", "volta"]) == 2
    assert capsys.readouterr().err == (
        "ofa_kernels.aot: unknown architecture 'volta'; name it like sm_80, sm_90, sm_100, gfx942\n"
    )


class Broken:
    """A kernel that does not compile."""

    fn = SimpleNamespace(__name__="a_kernel")
    arg_names = ()

    def warmup(self, *args, **keywords):
        raise RuntimeError("Internal codegen error\nptxas fatal   : Value 'sm_1' is not defined\nRepro command: ptxas")


def test_a_kernel_that_does_not_compile_is_named_with_the_compilers_error():
    case = SimpleNamespace(label="a case", launch=lambda: launching.run(Broken(), 1, torch.empty(1, 4), 4))
    with pytest.raises(aot.DoesNotCompile) as caught:
        aot._compile(case, "sm_90")
    assert str(caught.value) == (
        "a_kernel does not compile for sm_90 (a case): ptxas fatal   : Value 'sm_1' is not defined"
    )


@pytest.mark.parametrize(
    ("error", "sentence", "status"),
    [
        (aot.DoesNotCompile("a_kernel does not compile"), "a_kernel does not compile", 1),
        (BrokenProcessPool(), "the compiler crashed; does Triton know all of sm_90?", 1),
        (RuntimeError("TRITON_INTERPRET is set"), "TRITON_INTERPRET is set", 2),
    ],
    ids=["refused", "crashed", "interpreted"],
)
def test_what_does_not_compile_is_one_sentence(error, sentence, status, monkeypatch, capsys):
    """LLVM ends the process for an unknown processor."""

    def fail(architectures, cases):
        raise error

    monkeypatch.setattr(aot, "_build_all", fail)
    assert aot.main(["--arch", "sm_90"]) == status
    assert capsys.readouterr().err == f"ofa_kernels.aot: {sentence}\n"


def test_an_interpreter_is_refused(monkeypatch):
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        next(aot.build("sm_90", []))


@pytest.mark.parametrize(
    ("width", "usage", "complaint"),
    [
        (8192, Usage(64, 0, 0, 8, 2, 0), None),
        (8192, Usage(64, 84, 0, 8, 2, 0), "spills (84)"),
        (8193, Usage(64, 16, 0, 8, 2, 0), None),
        (8192, Usage(64, 0, 0, 0, 8, 0), "no 16-byte access"),
        (8192, Usage(64, 0, 0, 8, 2, 1), "float64"),
    ],
)
def test_failures_are_printed_and_end_in_status_1(width, usage, complaint, monkeypatch, capsys):
    built = aot.Built("a_kernel", "a case", width, "sm_90", 4, usage)
    monkeypatch.setattr(aot, "_build_all", lambda architectures, cases: [built])
    assert aot.main(["--arch", "sm_90"]) == (0 if complaint is None else 1)
    error = capsys.readouterr().err
    assert complaint in error if complaint else error == ""
