"""Compiling for GPUs on a machine without one: resources of the kernels, and that a launch finds the binaries."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ofa_kernels import aot, binaries, launch
from ofa_kernels.ops import launching
from ofa_kernels.resources import Usage
from tests.once import made_once

ROOT = Path(aot.__file__).parent.parent
TESTED = ("sm_80", "gfx942")
"""The least shared memory and the other vendor; the wheel below is for sm_90, and sm_100 has no limit of its own."""

ROWS = ["--width", "576", "--dtype", "bf16", "--samples", "1"]
FEWER = [*ROWS, "--norm", "layer+bias", "--head", "128", "--variant", "normed"]
FEW = [*FEWER, "shifted"]
"""The heaviest launches of a row, and attention with the most sums; `python -m ofa_kernels.aot` compiles them all."""

ROW_KERNELS = {
    f"{name}_{way}" for name in ("norm_step", "perturb", "displace", "contract") for way in ("forward", "backward")
}
ROW_KERNELS |= {"probed_diagonal_rows"}
CURVATURE = {f"attention_curvature_{part}" for part in ("queries", "keys", "sums")}
CURVATURE |= {"mlp_curvature_tokens", "add_partials"}
CURVATURE |= {f"{name}_tiles" for name in ("mlp_diagonal", "attention_trace", "attention_diagonal")}
KERNELS = ROW_KERNELS | CURVATURE
CENTRED = {"image_rows"}
"""The kernel that only a LayerNorm needs."""

OFFERED = """
import json, sys, torch
from triton import knobs
from triton.runtime import driver
from ofa_kernels import aot, binaries, workload
from ofa_kernels.ops.launching import launching_by

binaries.offer("sm_90")
hits = []
knobs.compilation.listener = lambda **what: hits.append(what["cache_hit"])
driver.set_active(aot._NoDevice(aot._target("sm_90")))

def compile_instead(kernel, grid, args, keywords):
    if len(hits) < int(sys.argv[1]):
        kernel.warmup(*args, grid=(grid,), **keywords)

for rows, cases in (
    (250, workload.cases([640], ["bf16"], ["layer+bias"], [1])),
    (240, workload.curvature_cases([128], ["bf16"], ["normed"])),  # Triton specializes a stride of the tokens' weights
):
    workload._ROWS = rows
    for case in cases:
        with launching_by(compile_instead, "sm_90"):
            case.launch()
print(json.dumps([aot.__file__, hits]))
"""
"""A launch for 250 rows of 640 columns and 240 tokens of heads of 128, without the launch itself: offer the
binaries, look up. The argument is the number of kernels to look up at most.

They were compiled for 256 rows and, of the widths, 576.
"""


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
    assert {row["kernel"] for row in compiled if row["architecture"] == architecture} == KERNELS | CENTRED


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
    ("error", "sentence"),
    [
        (aot.DoesNotCompile("a_kernel does not compile"), "a_kernel does not compile"),
        (BrokenProcessPool(), "the compiler crashed; does Triton know all of sm_90?"),
    ],
    ids=["refused", "crashed"],
)
def test_what_does_not_compile_is_one_sentence_and_status_1(error, sentence, monkeypatch, capsys):
    """LLVM ends the process for an unknown processor."""

    def fail(architectures, cases):
        raise error

    monkeypatch.setattr(aot, "_build_all", fail)
    assert aot.main(["--arch", "sm_90"]) == 1
    assert capsys.readouterr().err == f"ofa_kernels.aot: {sentence}\n"


def test_an_interpreter_is_refused():
    result = run("-m", "ofa_kernels.aot", "--arch", "sm_90", *FEWER, TRITON_INTERPRET=1)
    assert result.returncode == 2
    assert result.stderr.startswith("ofa_kernels.aot: TRITON_INTERPRET is set")


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
    built = aot.Built("a_kernel", "a case", width, "sm_90", 4, usage, binaries.Entry("KEY", ()))
    monkeypatch.setattr(aot, "_build_all", lambda architectures, cases: [built])
    assert aot.main(["--arch", "sm_90"]) == (0 if complaint is None else 1)
    error = capsys.readouterr().err
    assert complaint in error if complaint else error == ""


@pytest.fixture(scope="module")
def wheels(request, built):
    """Two wheels of this source: with kernels compiled for two architectures, out of the cache, and without."""

    def build(folder):
        source = folder / "source"
        source.mkdir()
        for name in ("ofa", "ofa_kernels"):
            shutil.copytree(ROOT / name, source / name)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source / name)
        for name, architectures in (("compiled", "sm_90 gfx942"), ("pure", "")):
            command = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder / name), "."]
            options = {"OFA_BUILD_ARCHS": architectures, "OFA_BUILD_OPTIONS": " ".join(FEWER)}
            result = run(*command, cwd=source, TRITON_CACHE_DIR=built / "cache", **options)
            assert result.returncode == 0, result.stdout + result.stderr

    folder = made_once(request, "wheels", build)
    return {name: next((folder / name).glob("*.whl")) for name in ("compiled", "pure")}


def test_a_wheel_is_pure_python_unless_asked(wheels):
    names = zipfile.ZipFile(wheels["pure"]).namelist()
    assert not [name for name in names if name.endswith((".cubin", ".hsaco"))]
    assert "ofa_kernels/kernels/norm_step.py" in names


def test_a_wheel_holds_the_kernels_it_was_asked_for(wheels):
    names = [Path(name) for name in zipfile.ZipFile(wheels["compiled"]).namelist()]
    for architecture, suffix in (("sm_90", ".cubin"), ("gfx942", ".hsaco")):
        found = {name.stem for name in names if architecture in name.parts and name.suffix == suffix}
        assert found == KERNELS


def test_the_run_time_finds_the_kernels_of_a_wheel(wheels, tmp_path):
    """A wheel with kernels compiles nothing at run time; a wheel without compiles the first kernel that is launched."""
    for name, hit, most in (("compiled", True, 10**6), ("pure", False, 1)):
        zipfile.ZipFile(wheels[name]).extractall(tmp_path / name)
        variables = {"PYTHONPATH": tmp_path / name, "TRITON_CACHE_DIR": tmp_path / f"cache of {name}"}
        result = run("-c", OFFERED, most, cwd=tmp_path, **variables)
        assert result.returncode == 0, result.stderr
        file, hits = json.loads(result.stdout)
        assert file.startswith(str(tmp_path / name))
        assert len(hits) >= min(most, len(KERNELS))
        assert set(hits) == {hit}


def test_a_cache_that_cannot_be_written_is_left_to_triton(tmp_path, monkeypatch, caplog):
    from triton import knobs

    (tmp_path / "cache").write_text("a file where a folder is wanted")
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "cache"))
    binaries.write(tmp_path / "shipped", [("sm_90", binaries.Entry("A" * 52, (("k.json", b"{}"),)))])
    assert binaries.offer.__wrapped__("sm_90", tmp_path / "shipped") == 0
    assert "cannot be used" in caplog.text


def test_binaries_are_offered_once_and_only_to_their_triton_and_architecture(tmp_path, monkeypatch):
    from triton import __version__, knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "cache"))
    entry = binaries.Entry("A" * 52, (("k.cubin", b"code"), ("k.json", b"{}")))
    binaries.write(tmp_path / "shipped", [("sm_90", entry)])
    assert (tmp_path / "shipped" / __version__ / "sm_90" / entry.key / "k.cubin").read_bytes() == b"code"
    assert binaries.offer.__wrapped__("sm_80", tmp_path / "shipped") == 0
    assert binaries.offer.__wrapped__("sm_90", tmp_path / "shipped") == 1
    assert (tmp_path / "cache" / entry.key / "k.cubin").read_bytes() == b"code"
    assert binaries.offer.__wrapped__("sm_90", tmp_path / "shipped") == 0
