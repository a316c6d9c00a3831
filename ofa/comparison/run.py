"""The run itself: what the engine reports goes into the results file and on the screen."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, cast

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
    described: Mapping[str, Any],
) -> None:
    """Run the cells and keep the record of each as soon as it is finished.

    `described` is what the folder keeps of the run, once a worker has the model.

    Raises:
        InputError: a record cannot be written, the workers cannot start, are of another version, or hold other weights
            than the results.
    """
    weights = _weights_of(plan.model, results.records)
    noted = False
    # Closing ends the workers, whatever happened here.
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
    """A worker on another machine may have another version of this package, and measure something else."""
    own, other = library_versions()["ofa-adapt"], versions["ofa-adapt"]
    if own != other:
        raise InputError(f"a worker has ofa-adapt {other}, and this is {own}: install the same version on every node")


def _weights_of(model: str, records: Sequence[Record]) -> str | None:
    known = (record.versions.get("weights") for record in records if record.cell.model == model)
    return next((weights for weights in known if weights), None)


def _same_weights(model: str, weights: str | None, versions: Mapping[str, str]) -> str:
    """The weights of a worker, which must be those of every other result of the same model."""
    loaded = versions["weights"]
    if weights is not None and weights != loaded:
        raise InputError(
            f"the results in the output folder were made with other weights of {model}, or in another dtype: choose "
            "another output folder"
        )
    return loaded
