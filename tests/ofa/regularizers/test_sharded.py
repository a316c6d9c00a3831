"""Several processes train as one would, and what they save is one adapter: DistributedDataParallel and FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ofa.on_two_ranks import CHECKS, RANKS
from tests.once import made_once

SECONDS = 150
"""Seconds until a hanging rank is killed: twenty times what both ranks take on one idle core."""


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    """The outcome of every check by rank: "" or a traceback."""
    folder = made_once(request, "two-ranks", run_ranks)
    files = [folder / f"rank-{rank}.json" for rank in range(RANKS)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


def run_ranks(folder: Path) -> None:
    # A file instead of a port for the rendezvous; the examples test torchrun.
    command = [sys.executable, "-m", "tests.ofa.on_two_ranks", str(folder)]
    environment = {**os.environ, "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = []
    for rank in range(RANKS):
        with (folder / f"rank-{rank}.log").open("w") as log:
            own = {**environment, "RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
    try:
        for process in ranks:
            process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        pass  # the checks that have no outcome fail
    finally:
        for process in ranks:
            process.kill()
            process.wait()


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name: str, outcomes: list[dict[str, str]]) -> None:
    for rank, found in enumerate(outcomes):
        assert found.get(name, "was not reached") == "", f"rank {rank}: {found.get(name)}"
