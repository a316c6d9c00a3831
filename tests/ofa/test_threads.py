"""The number of threads follows the container's quota, the load of other programs, and the user's setting."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from ofa import threads
from ofa.threads import Cores, quota, use_threads
from tests.ofa.command_line import TEMPLATE, TRAIN, done, ofa, write_rows


@pytest.fixture(autouse=True)
def _threads_as_before(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cores", "free"),
    [
        (Cores(2, None, 0.1), 2),
        (Cores(2, None, 1.0), 1),
        (Cores(2, None, 2.0), 1),
        (Cores(64, 3.5, 20.0), 4),
        (Cores(64, 0.5, 0.0), 1),
        (Cores(4, 8.0, 1.2), 3),
    ],
)
def test_free_cores_are_those_that_are_allowed_and_idle(cores, free):
    """The smaller of quota and idle cores, at least 1."""
    assert cores.free == free


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            },
            2.0,
        ),
        ({"proc/self/cgroup": "0::/of/the/machine\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({}, None),
    ],
    ids=["v2", "v2 without a limit", "v2 above", "v2 in a container", "v1", "v1 without a limit", "no groups"],
)
def test_the_quota_of_the_control_groups(tmp_path: Path, files, cores):
    """Versions 1 and 2, as seen on the host and in a container."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota(tmp_path) == cores


def _spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="only Linux counts the time of its cores")
def test_a_busy_process_is_counted(monkeypatch):
    """A spinning process uses one core, or its share of a machine without idle cores."""
    other = multiprocessing.get_context("spawn").Process(target=_spin, args=(60,))
    other.start()
    try:
        time.sleep(0.5)
        monkeypatch.setattr(threads, "_started", threads._moment())
        time.sleep(0.5)
        assert threads.usable_cores().busy > 0.4
    finally:
        other.kill()
        other.join()


def test_the_option_comes_before_the_environment(monkeypatch):
    """`--threads`, then OMP_NUM_THREADS, then the number of free cores."""
    monkeypatch.setattr(threads, "usable_cores", lambda: Cores(8, None, 7.0))
    torch.set_num_threads(2)
    assert use_threads(3) is None
    assert torch.get_num_threads() == 3
    assert use_threads(None) == Cores(8, None, 7.0)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert use_threads(None) is None
    assert torch.get_num_threads() == 2


def test_a_resumed_run_uses_its_first_number_of_threads(tiny_folder, tmp_path, monkeypatch):
    """Sums split over other threads round differently, and a resumed run must be bit-identical."""
    fit = ["fit", "--data", write_rows(tmp_path / "train.jsonl", TRAIN), "--template", TEMPLATE]
    fit += ["--model", tiny_folder, "--shots", 1, "--epochs", 2, "--out", tmp_path / "out"]

    def interrupt(update):
        def report(record, total):
            raise KeyboardInterrupt

        return report

    with monkeypatch.context() as patched:
        patched.setattr("ofa.commands.fit.losses_told", interrupt)
        assert ofa(*fit, "--threads", 2).status == 130
    torch.set_num_threads(1)
    done(*fit, "--resume")
    assert json.loads((tmp_path / "out" / "ofa_config.json").read_text())["threads"] == 2
