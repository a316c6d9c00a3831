"""Run cells: write what the workers finish to the results file, and show it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import cast

from ofa.comparison.records import Record
from ofa.comparison.store import ResultsFile
from ofa.comparison.workers import Event, Ready
from ofa.errors import InputError


def run_cells(
    model: str,
    events: Iterator[Event],
    results: ResultsFile,
    finished: Callable[[Record], None],
    say: Callable[[str], None],
    described: Mapping[str, object],
) -> None:
    """Write the record of each cell as soon as it is finished.

    Args:
        events: of `run_in_workers`, or of a stand-in; closed at the end, which ends the workers, also after an error.
        finished: called with each record, once it is written.
        say: called with each notice.
        described: noted in the folder once a worker has loaded the model.

    Raises:
        InputError: a record cannot be written, the workers cannot start, or have other weights than the results.
    """
    weights = _weights_of(model, results.records)
    noted = False
    with closing(cast(Generator[Event], events)):
        for event in events:
            if isinstance(event, Ready):
                weights = _same_weights(model, weights, event.versions)
                if not noted:
                    results.note_run(described)
                noted = True
            elif isinstance(event, Record):
                results.append(event)
                finished(event)
            else:
                say(event)


def _weights_of(model: str, records: Sequence[Record]) -> str | None:
    known = (record.versions.get("weights") for record in records if record.cell.model == model)
    return next((weights for weights in known if weights), None)


def _same_weights(model: str, weights: str | None, versions: Mapping[str, str]) -> str:
    """Check that a worker's weights equal those of every other result of the same model, and return their hash."""
    loaded = versions["weights"]
    if weights is not None and weights != loaded:
        raise InputError(
            f"the results in the output folder were made with other weights of {model}, or in another dtype: choose "
            "another output folder"
        )
    return loaded
