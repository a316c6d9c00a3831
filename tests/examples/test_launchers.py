"""The examples with several processes, run small by their launchers, over gloo on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ofa.adapters.read import read_adapter
from tests.examples.test_loops import run
from tests.once import made_once

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NAMES = ["ddp", "fsdp", "trainer", "accelerate_loop"]
LAUNCH = ["accelerate.commands.launch", "--config_file", "accelerate_ddp.yaml", "--main_process_port", "0"]
"""accelerate starts its processes by torchrun, so that this launch is both."""
SECONDS = 240
"""Seconds until a hanging rank is killed: ten times what the slowest launch takes on one idle core."""


def launch(*command: str) -> str:
    """The output of a Python module with these arguments, and of the processes that it starts."""
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=EXAMPLES,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, printed[-4000:]
    return printed


@pytest.fixture(scope="module")
def launched(request: pytest.FixtureRequest, tiny_folder: Path) -> Path:
    """A folder with the adapter of every example, and what its launch printed."""

    def launch_all(folder: Path) -> None:
        options = ["--model", str(tiny_folder), "--epochs", "3", "--batch-size", "5"]
        in_turn = [str(ROOT / "tests" / "examples" / "in_turn.py"), ",".join(NAMES), str(folder)]
        (folder / "printed").write_text(launch(*LAUNCH, *in_turn, *options))

    return made_once(request, "launchers", launch_all)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_end_where_the_plain_loop_ends(
    name: str, launched: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Each process has five of the ten shots, the plain loop all of them."""
    assert f"saved {launched / name}" in (launched / "printed").read_text()
    plain = run("plain_loop", tiny_folder, tmp_path / "plain", "--batch-size", "10", rounds=3)
    tuned = read_adapter(launched / name).parameters
    assert tuned.keys() == plain.keys()
    for path, scale in plain.items():
        assert float((scale - 1).abs().max()) > 1e-3
        # Sums over shots in another order, in float32; Adam divides small gradients by their own size.
        torch.testing.assert_close(tuned[path], scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("name", "kind"), [("accelerate_ddp", "MULTI_GPU"), ("accelerate_fsdp", "FSDP")])
def test_accelerate_knows_every_line_of_its_configuration(name: str, kind: str) -> None:
    """accelerate runs FSDP2 only on GPUs; it refuses unknown keys."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(EXAMPLES / f"{name}.yaml"))
    assert config.distributed_type == kind
    sharding = {"fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": False} if kind == "FSDP" else {}
    assert config.fsdp_config.items() >= sharding.items()
