"""Scheduling cells on workers that finish, die, refuse or stay silent; the workers are fakes."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from unittest import mock

import pytest

from ofa.comparison import workers
from ofa.comparison.placement import Placement
from ofa.comparison.records import Cell, Record
from ofa.comparison.workers import ATTEMPTS, Ready, Refused, Source, run_in_workers
from ofa.errors import InputError

CELLS = [Cell("m", "mood", "0", "ofa", seed, 5, 4) for seed in range(4)]
PLACES = [Placement("cpu", 1, name) for name in ("a", "b")]
DIES, SPOILS = "dies", "spoils"


class Played:
    """A fake worker that answers at once: it loads the model and handles cells as its script says."""

    def __init__(self, placement, office):
        self.placement, self.given = placement, []
        self._office, self._answer = office, office.starts.popleft() if office.starts else Ready({"by": placement})
        self.ended = False
        office.hired.append(self)

    def receive(self):
        return None if self._answer == DIES else self._answer

    def give(self, job):
        cell = job
        self.given.append(cell.seed)
        fate = self._office.fates.get(cell.seed, deque())
        fate = fate.popleft() if fate else None
        self._answer = fate if fate == DIES else SimpleNamespace(record=Record(cell), intact=fate != SPOILS)

    def end_in_words(self):
        self.ended = True
        return "was killed by signal 9"

    def kill(self):
        self.ended = True


class Office:
    """Starts fake workers, and hears them in turn."""

    def __init__(self, starts=(), fates=None):
        self.starts, self.fates = deque(starts), {seed: deque(fate) for seed, fate in (fates or {}).items()}
        self.hired, self._turn = [], 0

    def hear(self, crew):
        self._turn += 1
        return [list(crew)[self._turn % len(crew)]]

    def run(self, cells=CELLS, places=PLACES[:1]):
        with mock.patch.multiple(workers, Worker=lambda source, place: Played(place, self), _wait_any=self.hear):
            yield from run_in_workers(cells, lambda cell: cell, Source({"model": "a-model"}), places)

    @property
    def given(self):
        """The seeds of the cells that workers were given, worker by worker."""
        return [seed for worker in self.hired for seed in worker.given]


def seeds(events):
    return [event.cell.seed for event in events if isinstance(event, Record)]


def notices(events):
    return [event for event in events if isinstance(event, str)]


def test_one_worker_runs_the_cells_in_order_and_is_ended():
    office = Office()
    events = list(office.run())
    assert office.given == seeds(events) == [0, 1, 2, 3]
    assert [isinstance(event, Ready) for event in events] == [True] + [False] * 4
    assert [worker.ended for worker in office.hired] == [True]


def test_several_workers_share_the_cells():
    office = Office()
    events = list(office.run(places=PLACES))
    assert sorted(seeds(events)) == [0, 1, 2, 3]
    assert [worker.placement for worker in office.hired] == PLACES
    assert all(worker.given for worker in office.hired)


def test_no_more_workers_than_cells():
    office = Office()
    list(office.run(cells=CELLS[:1], places=PLACES))
    assert len(office.hired) == 1


def test_the_cell_of_a_dead_worker_runs_again_on_a_new_one():
    office = Office(fates={1: [DIES]})
    events = list(office.run())
    assert seeds(events) == [0, 1, 2, 3]
    assert office.given == [0, 1, 1, 2, 3]
    assert all(event.done for event in events if isinstance(event, Record))
    assert notices(events) == [
        "the worker that ran ofa on mood, seed 1, was killed by signal 9; the cell runs again",
    ]
    assert [worker.placement for worker in office.hired] == [PLACES[0]] * 2


def test_a_cell_that_kills_every_worker_is_recorded_and_the_rest_runs():
    office = Office(fates={1: [DIES] * ATTEMPTS})
    records = [event for event in office.run() if isinstance(event, Record)]
    assert [(record.cell.seed, record.error) for record in records] == [
        (0, None),
        (1, "3 workers died while they ran this cell, the last one was killed by signal 9"),
        (2, None),
        (3, None),
    ]
    assert len(office.hired) == 1 + ATTEMPTS


def test_a_worker_whose_model_was_changed_is_replaced_and_its_record_kept():
    office = Office(fates={1: [SPOILS], 3: [SPOILS]})
    events = list(office.run())
    assert seeds(events) == [0, 1, 2, 3]
    assert len(notices(events)) == 1, "behind the last cell nobody is needed any more"
    assert [worker.ended for worker in office.hired] == [True, True]


def test_a_refused_model_ends_the_run_and_every_worker():
    office = Office(starts=[Ready({}), Refused("there is no such model")])
    with pytest.raises(InputError, match="there is no such model"):
        list(office.run(places=PLACES))
    assert [worker.ended for worker in office.hired] == [True, True]


def test_workers_that_die_before_they_have_loaded_are_tried_again_and_then_given_up():
    events = list(Office(starts=[DIES, DIES]).run())
    assert seeds(events) == [0, 1, 2, 3]
    with pytest.raises(InputError, match="3 workers died while they loaded the model, the last one was killed"):
        list(Office(starts=[DIES] * ATTEMPTS).run())


def test_workers_that_die_while_others_run_are_not_started_again():
    office = Office(starts=[Ready({}), DIES])
    events = list(office.run(places=PLACES))
    assert sorted(seeds(events)) == [0, 1, 2, 3]
    assert notices(events) == ["a worker was killed by signal 9 while it loaded the model; 1 continue"]
    assert len(office.hired) == 2


def test_closing_the_run_ends_every_worker():
    """As Ctrl-C and a full disk do."""
    office = Office()
    events = office.run(places=PLACES)
    next(events)
    events.close()
    assert [worker.ended for worker in office.hired] == [True, True]
