"""Run workers as Ray actors, on an existing cluster or on a local one for the duration of the run.

Every node of a cluster needs this package, and the model under the same name.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ofa.comparison.engines import Event, Placement, Ready, Source
from ofa.comparison.engines.crew import run_crew
from ofa.comparison.engines.placement import check_sharing, way_out
from ofa.comparison.engines.worker import Refused, load, place
from ofa.comparison.records import Cell
from ofa.errors import InputError, first_sentence

if TYPE_CHECKING:
    from ofa.comparison.cell import CellRunner, Outcome
    from ofa.comparison.plan import Job

_PATIENCE = 30.0
"""Seconds without a message before the notice that no worker has started."""
_CONNECT = 5.0
"""Timeout in seconds for a cluster's answer; Ray itself would try for many minutes."""


def check_installed() -> None:
    """Check that Ray is installed, without importing it, which takes seconds.

    Raises:
        InputError: it is not installed.
    """
    if find_spec("ray") is None:
        raise InputError(
            '--engine ray needs Ray, which is not installed: pip install -c constraints.txt -e ".[compare]", or leave '
            "out --engine ray"
        )


@contextmanager
def ray_engine(
    source: Source, *, address: str | None, workers: int | None, workers_per_gpu: int = 1, device: str, cores: int
) -> Iterator[RayEngine]:
    """An engine on the cluster at `address`, or on a local one with `cores` cores.

    The default is `workers_per_gpu` workers for each GPU of the cluster, or one for each node without GPUs.

    Raises:
        InputError: Ray is not installed, there is no such cluster, or it has fewer slots on GPUs than workers.
    """
    check_installed()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = import_module("ray")
    _connect(ray, address, max(cores, workers or 1))
    try:
        given = shared_placements(ray.nodes(), workers, device, source.device_map, workers_per_gpu)
        yield RayEngine(ray, source, *given)
    finally:
        ray.shutdown()


class RayEngine:
    """One actor for each placement, with `gpus` GPUs, which may be a fraction. See `Engine`."""

    def __init__(self, ray: ModuleType, source: Source, placements: Sequence[Placement], gpus: float) -> None:
        self._ray, self._source = ray, source
        self._placements, self._gpus = tuple(placements), gpus

    @property
    def workers(self) -> int:
        """The number of cells that run at the same time."""
        return len(self._placements)

    def run(self, cells: Sequence[Cell], job: Callable[[Cell], Job]) -> Iterator[Event]:
        """Run every cell; see `Engine.run`."""
        return run_crew(cells, job, self._placements, self._spawn, self._wait_any)

    def _spawn(self, placement: Placement) -> _Remote:
        return _Remote(self._ray, self._source, placement, self._gpus)

    def _wait_any(self, remotes: list[_Remote]) -> list[_Remote]:
        answers = {remote.answer: remote for remote in remotes}
        ready, _ = self._ray.wait(list(answers), timeout=_PATIENCE)
        return [answers[answer] for answer in ready]


class _Remote:
    """Handle of an actor in the driver."""

    def __init__(self, ray: ModuleType, source: Source, placement: Placement, gpus: float) -> None:
        self.placement = placement
        self.pid = 0
        self._ray = ray
        self._death = ""
        wanted = ray.remote(num_cpus=placement.threads, num_gpus=gpus, max_restarts=0, max_task_retries=0)
        self._actor = wanted(_Actor).remote(source, placement)
        self.answer = self._actor.load.remote()

    def receive(self) -> Ready | Refused | Outcome | None:
        try:
            self.pid, message = self._ray.get(self.answer)
        except self._ray.exceptions.RayError as error:
            self._death = first_sentence(error)
            return None
        return message

    def give(self, job: Job) -> None:
        self.answer = self._actor.run.remote(job)

    def end_in_words(self) -> str:
        return f"is gone ({self._death})"

    def kill(self) -> None:
        with suppress(Exception):  # the actor or the cluster has ended already
            self._ray.kill(self._actor)


class _Actor:
    """The worker on the cluster; every answer includes its process id."""

    def __init__(self, source: Source, placement: Placement) -> None:
        self._source, self._placement = source, placement
        self._runner: CellRunner | None = None

    def load(self) -> tuple[int, Ready | Refused]:
        place(self._placement)
        try:
            self._runner = load(self._source, self._placement)
        except Refused as error:
            return os.getpid(), error
        return os.getpid(), Ready(self._runner.versions)

    def run(self, job: Job) -> tuple[int, Outcome]:
        assert self._runner is not None
        return os.getpid(), self._runner.run(job)


def _connect(ray: ModuleType, address: str | None, cores: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        # Ray's default niceness of 15 starves workers on a busy machine.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
        return
    _check_address(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"there is no Ray cluster at {address} ({first_sentence(error)}): check --ray-address"
        ) from error


def _check_address(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # such as "auto", which Ray looks up at once
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT).close()
    except OSError as error:
        raise InputError(
            f"there is no Ray cluster at {address} ({first_sentence(error)}): check --ray-address"
        ) from error


def shared_placements(
    nodes: Sequence[Mapping[str, Any]],
    workers: int | None,
    device: str,
    device_map: str | None,
    workers_per_gpu: int = 1,
) -> tuple[list[Placement], float]:
    """The placements on these nodes, and the GPUs of each: a fraction if several workers share one."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = [int(node.get("CPU", 0)) for node in alive if node.get("CPU", 0) >= 1]
    gpus = 0 if device == "cpu" else int(sum(node.get("GPU", 0) for node in alive))
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {device} cannot be used on a cluster: choose auto, cuda or cpu")
    if not cpus:
        raise InputError("the Ray cluster has no node with a CPU: start one with `ray start`")
    check_sharing(workers_per_gpu, gpus, device_map)
    if not gpus:
        count = workers or len(cpus)
        # At most the cores of the smallest node, since an actor runs on one node.
        threads = max(1, min(sum(cpus) // count, *cpus))
        return [Placement(device, threads)] * count, 0
    count = workers or (1 if device_map is not None else gpus * workers_per_gpu)
    if count > gpus * workers_per_gpu:
        raise InputError(
            f"--workers is {count}, but the cluster has a GPU for only {gpus * workers_per_gpu} of them: lower "
            f"--workers, {way_out(count, gpus, device_map)}or choose --device cpu"
        )
    sharing = -(-count // gpus)
    actors = [Placement("cuda", max(1, min(sum(cpus) // count, *cpus)), sharing=sharing)] * count
    return actors, gpus // count if device_map else _part(sharing)


def _part(sharing: int) -> float:
    """A GPU's fraction, rounded down to Ray's four decimals so that all workers fit."""
    return 1 if sharing == 1 else 10_000 // sharing / 10_000
