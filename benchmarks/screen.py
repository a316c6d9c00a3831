"""Screen settings that are not in the program, and write them as `ofa compare` writes its cells.

    python -m benchmarks.screen studies/terms.yaml studies/records/terms

The grid is one of `ofa compare` whose rows may also have the settings of `benchmarks.screened_terms.fit`, such as
`sharpness: 0.3 of the gradient`. Cells that have a record are kept, so that a stopped run continues.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ofa.commands.options import read_mapping
from ofa.comparison.cell import CellRunner
from ofa.comparison.grid import Grid
from ofa.comparison.plan import Job, TaskPlan, read_tasks
from ofa.comparison.records import Cell
from ofa.comparison.store import opened
from ofa.methods import METHODS
from ofa.models.load import load_model

SCREENED = "screened"
"""The method's name while a cell runs; its record has the one of the grid."""


def main() -> None:
    """Run the cells of the grid that have no record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("grid", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    grid = Grid(**{name: value for name, value in read_mapping(given.grid).items() if name in Grid.model_fields})
    # Without the methods, whose settings the program would refuse.
    tasks = read_tasks(grid.model_copy(update={"methods": ()}), offline=True)
    METHODS[SCREENED] = "benchmarks.screened_terms"
    loaded = load_model(grid.model, dtype=grid.dtype, device="cpu", offline=True)
    runner = CellRunner(loaded)
    with opened(given.out) as results:
        for cell in cells(grid, tasks, loaded.name):
            if cell.key in {record.cell.key for record in results.records}:
                continue
            task = tasks[cell.task]
            run = replace(cell, method=SCREENED)
            job = Job(run, task.task, task.drawn[cell.seed], task.tested, {}, grid.contexts)
            record = replace(runner.run(job).record, cell=cell)
            results.append(record)
            scored = record.scores["prompt"].accuracy if record.done else record.error
            print(f"{cell.row}, {cell.task}, seed {cell.seed}: {scored}", flush=True)


def cells(grid: Grid, tasks: Mapping[str, TaskPlan], model: str) -> list[Cell]:
    """Seed by seed and row by row, so that every row has all tasks early."""
    return [
        Cell(model, name, plan.sha256, row.method, seed, grid.shots, grid.test_size, row.settings)
        for seed in grid.seeds
        for row in grid.methods
        for name, plan in tasks.items()
    ]


if __name__ == "__main__":
    main()
