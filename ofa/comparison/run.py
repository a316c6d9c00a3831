"""Run cells: write the engine's events to the results file, and show them."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import cast

from ofa.comparison.engines import Engine, Event, Finished, Notice, Ready, Started
from ofa.comparison.environment import library_versions
from ofa.comparison.plan import Plan
from ofa.comparison.progress import Progress
from ofa.comparison.records import Cell, Record
from ofa.comparison.store import ResultsFile
from ofa.errors import InputError


def run_cells(
    plan: Plan,
    cells: Sequence[Cell],
    results: ResultsFile,
    engine: Engine,
    progress: Progress,
    described: Mapping[str, object],
) -> None:
    """Run the cells, and write the record of each as soon as it is finished.

    `described` is noted in the folder once a worker has loaded the model.

    Raises:
        InputError: a record cannot be written, the workers cannot start, have another version of this package, or have
            other weights than the results.
    """
    weights = _weights_of(plan.model, results.records)
    noted = False
    # Closing the generator ends the workers, also after an error.
    with closing(cast(Generator[Event], engine.run(cells, plan.job))) as events:
        for event in events:
            if isinstance(event, Ready):
                _check_version(event.versions)
                weights = _same_weights(plan.model, weights, event.versions)
                if not noted:
                    results.note_run(described)
                noted = True
            elif isinstance(event, Started):
                progress.started(event.cell)
            elif isinstance(event, Finished):
                results.append(event.record)
                progress.finished(event.record)
            elif isinstance(event, Notice):
                progress.say(event.text)


def _check_version(versions: Mapping[str, str]) -> None:
    """Check that a worker on another machine has the same version of this package."""
    own, other = library_versions()["ofa-adapt"], versions["ofa-adapt"]
    if own != other:
        raise InputError(f"a worker has ofa-adapt {other}, not {own}: install the same version on every node")


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
