"""One GPU for each worker, the cores divided among them, and refusals where there are too few."""

from __future__ import annotations

import pytest

from ofa.comparison.engines import Placement
from ofa.comparison.engines.machines import Machines, check_machines, foreseen_workers
from ofa.comparison.engines.placement import available_cores, placements, visible_gpus
from ofa.comparison.engines.ray import shared_placements
from ofa.comparison.grid import checked_part
from ofa.errors import InputError
from ofa.threads import Cores

FOUR = ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("workers", "device", "device_map", "gpus", "expected"),
    [
        (None, "auto", None, (), [Placement("auto", 8)]),
        (3, "auto", None, (), [Placement("auto", 2)] * 3),
        (16, "cpu", None, (), [Placement("cpu", 1, "")] * 16),
        (2, "cpu", None, FOUR, [Placement("cpu", 4, "")] * 2),
        (None, "auto", None, FOUR, [Placement("cuda", 2, gpu) for gpu in FOUR]),
        (2, "cuda", None, ("5", "GPU-7f"), [Placement("cuda", 4, "5"), Placement("cuda", 4, "GPU-7f")]),
        (None, "cuda:2", None, FOUR, [Placement("cuda", 8, "2")]),
        (None, "auto", "auto", FOUR, [Placement("cuda", 8, "0,1,2,3")]),
        (2, "auto", "auto", FOUR, [Placement("cuda", 4, "0,1"), Placement("cuda", 4, "2,3")]),
        (None, "mps", None, (), [Placement("mps", 8)]),
        # A GPU that does not exist is refused later, by the model's loader.
        (None, "cuda", None, (), [Placement("cuda", 8)]),
    ],
)
def test_placements_of_workers(workers, device, device_map, gpus, expected):
    """On a machine with eight cores. A CPU run hides the GPUs from its workers."""
    assert placements(workers, device, device_map=device_map, gpus=gpus, cores=8) == tuple(expected)


@pytest.mark.parametrize(("workers", "device", "gpus"), [(5, "auto", FOUR), (2, "cuda:1", FOUR)])
def test_more_workers_than_gpus_are_refused(workers, device, gpus):
    with pytest.raises(InputError, match=f"--workers is {workers}, but there is a GPU for"):
        placements(workers, device, device_map=None, gpus=gpus, cores=8)


@pytest.mark.parametrize(
    ("workers", "each", "gpus", "expected"),
    [
        (None, 2, ("0", "1"), [("0", 2), ("1", 2), ("0", 2), ("1", 2)]),
        (None, 3, ("7",), [("7", 3)] * 3),
        # No more share than must, and one that need not share does not.
        (3, 4, ("0", "1"), [("0", 2), ("1", 1), ("0", 2)]),
        (2, 8, ("0", "1"), [("0", 1), ("1", 1)]),
        (1, 8, ("0", "1"), [("0", 1)]),
    ],
)
def test_workers_share_gpus_evenly(workers, each, gpus, expected):
    found = placements(workers, "auto", device_map=None, gpus=gpus, cores=8, workers_per_gpu=each)
    assert [(one.visible_gpus, one.sharing) for one in found] == expected
    assert {one.threads for one in found} == {8 // len(found)}


@pytest.mark.parametrize(("workers", "gpus", "enough"), [(8, ("0",), 8), (5, FOUR, 2), (9, FOUR, 3)])
def test_the_refusal_names_the_sharing_that_is_enough(workers, gpus, enough):
    with pytest.raises(InputError, match=f"let them share with --workers-per-gpu {enough}, or choose --device cpu"):
        placements(workers, "auto", device_map=None, gpus=gpus, cores=8, workers_per_gpu=enough - 1)
    assert len(placements(workers, "auto", device_map=None, gpus=gpus, cores=8, workers_per_gpu=enough)) == workers
    with pytest.raises(InputError, match="lower --workers, or choose --device cpu"):
        placements(workers, "auto", device_map="auto", gpus=gpus, cores=8)


@pytest.mark.parametrize(
    ("device", "device_map", "gpus", "words"),
    [
        (
            "auto",
            None,
            (),
            "--workers-per-gpu 2 has no effect without a CUDA GPU: leave it out, and pass --wo",
        ),
        ("cpu", None, FOUR, "--workers-per-gpu 2 has no effect without a CUDA GPU"),
        ("auto", "auto", FOUR, "and --device-map a worker on several: leave one of them out"),
    ],
)
def test_sharing_where_there_is_nothing_to_share_is_refused(device, device_map, gpus, words):
    with pytest.raises(InputError, match=words):
        placements(None, device, device_map=device_map, gpus=gpus, cores=8, workers_per_gpu=2)
    with pytest.raises(InputError, match=words):
        shared_placements([node(8, len(gpus))], None, device, device_map, 2)


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
    monkeypatch.setattr("ofa.comparison.engines.placement.usable_cores", lambda: Cores(8, None, 6.0))
    assert available_cores() == 2


# Clusters


def node(cpus, gpus=0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": float(cpus), "GPU": float(gpus), "memory": 1.0}}


@pytest.mark.parametrize(
    ("nodes", "workers", "device", "device_map", "expected", "gpus"),
    [
        ([node(8)], None, "auto", None, [Placement("auto", 8)], 0),
        ([node(8), node(4), node(9, alive=False)], None, "auto", None, [Placement("auto", 4)] * 2, 0),
        ([node(8)], 3, "cpu", None, [Placement("cpu", 2)] * 3, 0),
        ([node(8, 2), node(8, 2)], None, "auto", None, [Placement("cuda", 4)] * 4, 1),
        ([node(8, 2), node(8, 2)], 2, "cpu", None, [Placement("cpu", 8)] * 2, 0),
        ([node(16, 4)], 2, "auto", "auto", [Placement("cuda", 8)] * 2, 2),
    ],
)
def test_placements_of_actors(nodes, workers, device, device_map, expected, gpus):
    """An actor runs on one node, so none requests more cores than the smallest node has."""
    assert shared_placements(nodes, workers, device, device_map) == (expected, gpus)


@pytest.mark.parametrize(
    ("nodes", "workers", "each", "sharing", "gpus"),
    [
        ([node(8, 2), node(8, 2)], None, 2, 2, 0.5),
        ([node(8, 1)], 6, 8, 6, 0.1666),
        ([node(8, 4)], 3, 8, 1, 1),
    ],
)
def test_actors_share_gpus_in_fractions_that_all_fit(nodes, workers, each, sharing, gpus):
    """Fractions are rounded down: six times 0.1667 is more than a GPU."""
    actors, part = shared_placements(nodes, workers, "auto", None, each)
    assert {actor.sharing for actor in actors} == {sharing}
    assert part == gpus
    assert sharing * part <= 1


@pytest.mark.parametrize(
    ("nodes", "workers", "device", "words"),
    [
        ([node(8, 2)], 3, "auto", "--workers is 3, but the cluster has a GPU for only 2.*--workers-per-gpu 2"),
        ([node(8)], None, "cuda:1", "--device cuda:1 cannot be used on a cluster"),
        ([node(0)], None, "auto", "no node with a CPU"),
    ],
)
def test_what_a_cluster_cannot_give_is_refused(nodes, workers, device, words):
    with pytest.raises(InputError, match=words):
        shared_placements(nodes, workers, device, None)


# Options


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"engine": "rey"}, "--engine rey cannot be used: input should be 'local' or 'ray'"),
        ({"workers": 0}, "--workers 0 cannot be used"),
        ({"workers_per_gpu": 0}, "--workers-per-gpu 0 cannot be used: input should be greater than or equal to 1"),
        ({"workers_per_gpu": "many"}, "--workers-per-gpu many cannot be used"),
    ],
)
def test_missing_machines_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        checked_part(Machines, values)


def test_an_estimate_counts_on_every_place_of_this_machine(monkeypatch):
    monkeypatch.setattr("ofa.comparison.engines.machines.visible_gpus", lambda: ("0", "1"))
    assert foreseen_workers(Machines(workers_per_gpu=4)) == 8
    assert foreseen_workers(Machines(workers_per_gpu=4, workers=3)) == 3
    assert foreseen_workers(Machines(device="cpu")) == 1
    assert foreseen_workers(Machines(engine="ray", workers=5)) == 5


def test_contradictions_are_refused_before_anything_starts(monkeypatch):
    with pytest.raises(InputError, match="--ray-address has no effect with the local engine: add --engine ray"):
        check_machines(Machines(ray_address="auto"))
    monkeypatch.setattr("ofa.comparison.engines.ray.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"Ray, which is not installed: pip install .*\[compare\]"):
        check_machines(Machines(engine="ray"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"leave out `accelerate launch`.*--device-map auto"):
        check_machines(Machines())
