"""Run the cells of a plan in processes of this machine, or on a Ray cluster, with the same results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ofa.comparison.records import Cell, Record

if TYPE_CHECKING:
    from ofa.comparison.plan import Job


@dataclass(frozen=True)
class Source:
    """The model that every worker loads, as the arguments of `load_model`, and the batch size of its tests."""

    model: str | None
    dtype: str = "float32"
    device_map: str | None = None
    trust_remote_code: bool = False
    offline: bool = False
    batch_size: int = 16


@dataclass(frozen=True)
class Placement:
    """The device and threads of one worker. `visible_gpus` sets CUDA_VISIBLE_DEVICES; None leaves it unchanged.

    `sharing` is the number of workers on its GPU, including itself.
    """

    device: str
    threads: int
    visible_gpus: str | None = None
    sharing: int = 1


@dataclass(frozen=True)
class Ready:
    """A worker has loaded the model; `versions` as in its records."""

    versions: Mapping[str, str]


@dataclass(frozen=True)
class Started:
    """A cell was given to the worker process of this id."""

    cell: Cell
    pid: int


@dataclass(frozen=True)
class Finished:
    """A cell is done or has failed finally."""

    record: Record


@dataclass(frozen=True)
class Notice:
    """A message for the user."""

    text: str


Event = Ready | Started | Finished | Notice


class Engine(Protocol):
    """Runs cells in workers that each load the model once."""

    @property
    def workers(self) -> int:
        """The number of cells that run at the same time."""
        ...

    def run(self, cells: Sequence[Cell], job: Callable[[Cell], Job]) -> Iterator[Event]:
        """Start the cells in this order; closing the iterator ends all workers at once.

        A cell whose worker dies runs again, see `crew.ATTEMPTS`.

        Raises:
            InputError: the workers cannot start or cannot load the model.
        """
        ...
