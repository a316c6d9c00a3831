"""One GPU for each worker, the cores divided among them, and refusals where there are too few."""

from __future__ import annotations

import pytest

from ofa.comparison.grid import checked_part
from ofa.comparison.placement import Machines, Placement, available_cores, placements, visible_gpus
from ofa.errors import InputError
from ofa.threads import Cores

FOUR = ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("workers", "device", "spread", "gpus", "expected"),
    [
        (None, "auto", False, (), [Placement("auto", 8)]),
        (3, "auto", False, (), [Placement("auto", 2)] * 3),
        (16, "cpu", False, (), [Placement("cpu", 1, "")] * 16),
        (2, "cpu", False, FOUR, [Placement("cpu", 4, "")] * 2),
        (None, "auto", False, FOUR, [Placement("cuda", 2, gpu) for gpu in FOUR]),
        (2, "cuda", False, ("5", "GPU-7f"), [Placement("cuda", 4, "5"), Placement("cuda", 4, "GPU-7f")]),
        (None, "cuda:2", False, FOUR, [Placement("cuda", 8, "2")]),
        (None, "auto", True, FOUR, [Placement("cuda", 8, "0,1,2,3")]),
        (2, "auto", True, FOUR, [Placement("cuda", 4, "0,1"), Placement("cuda", 4, "2,3")]),
        (None, "mps", False, (), [Placement("mps", 8)]),
        # A GPU that does not exist is refused later, by the model's loader.
        (None, "cuda", False, (), [Placement("cuda", 8)]),
    ],
)
def test_placements_of_workers(workers, device, spread, gpus, expected):
    """On a machine with eight cores. A CPU run hides the GPUs from its workers."""
    assert placements(workers, device, None, spread=spread, gpus=gpus, cores=8) == tuple(expected)


@pytest.mark.parametrize(("workers", "device", "gpus"), [(5, "auto", FOUR), (2, "cuda:1", FOUR)])
def test_more_workers_than_gpus_are_refused(workers, device, gpus):
    with pytest.raises(InputError, match=f"--workers is {workers}, but there is a GPU for"):
        placements(workers, device, None, spread=False, gpus=gpus, cores=8)


def test_gpus_and_cores_are_those_of_this_process(monkeypatch):
    """As restricted by the environment."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, 3,7")
    assert visible_gpus() == ("GPU-a", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert available_cores() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("ofa.comparison.placement.usable_cores", lambda: Cores(8, None, 6.0))
    assert available_cores() == 2


# Options


@pytest.mark.parametrize("value", [0, "many"])
def test_a_number_of_workers_that_cannot_be_is_refused(value):
    with pytest.raises(InputError, match=f"--workers {value} cannot be used"):
        checked_part(Machines, {"workers": value})


def test_threads_are_those_asked_for_or_the_cores_divided(monkeypatch):
    monkeypatch.setattr("ofa.comparison.placement.visible_gpus", lambda: ())
    monkeypatch.setattr("ofa.comparison.placement.available_cores", lambda: 8)
    assert [one.threads for one in Machines(workers=2).placements()] == [4, 4]
    assert [one.threads for one in Machines(workers=2, threads=3).placements()] == [3, 3]


def test_a_launcher_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"leave out `accelerate launch`.*--device-map auto"):
        Machines().placements()
