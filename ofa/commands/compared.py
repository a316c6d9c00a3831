"""Print the output of `ofa compare`: the cells of a dry run, and the scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean

from rich.table import Table

from ofa.commands.console import show, show_json
from ofa.comparison.plan import Plan, Size
from ofa.comparison.progress import Expectation, in_words
from ofa.comparison.records import Cell, Record


def show_plan(
    plan: Plan, cells: Sequence[Cell], records: Sequence[Record], sizes: Mapping[str, Size], workers: int, as_json: bool
) -> None:
    """Show the cells of a plan by task and row, which of them will run, and their estimated time.

    Estimates are from the most similar finished cells in the same folder, if there are any.
    """
    expectation = Expectation(records)
    seconds = {cell.key: expectation.seconds(cell) for cell in cells}
    estimate = expectation.estimate(cells, workers, {})
    if as_json:
        entries = [_entry(cell, seconds, sizes) for cell in plan.cells]
        show_json({"cells": entries, "to_run": len(cells), "estimate": asdict(estimate)})
        return
    table = Table()
    for name in ("task", "method", "seeds to run", "time of a cell", "tokens to test"):
        table.add_column(name, justify="left" if name in ("task", "method", "seeds to run") else "right")
    by_row: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        by_row[cell.task, cell.row].append(cell)
    for (task, row), own in by_row.items():
        each = seconds[own[0].key]
        seeds = ", ".join(str(cell.seed) for cell in own)
        table.add_row(task, row, seeds, "unknown" if each is None else in_words(each), f"{sizes[task].prompts:,}")
    show(table)
    show(
        f"{len(cells)} of {len(plan.cells)} cells to run with {workers} worker{'s' if workers > 1 else ''}: {estimate}"
    )
    if estimate.unknown:
        show(f"{estimate.unknown} of them are of methods that have not finished a cell in this folder")


def show_scores(records: Sequence[Record]) -> None:
    """Show the mean accuracy over the seeds, by row and task; `ofa report` adds the statistics."""
    tasks = list(dict.fromkeys(record.cell.task for record in records))
    table = Table(title="accuracy, mean over seeds")
    table.add_column("method")
    table.add_column("in front of a text")
    for task in tasks:
        table.add_column(task, justify="right")
    for (row, context), by_task in _accuracies(records).items():
        shown = [f"{fmean(by_task[task]):.3f}" if task in by_task else "" for task in tasks]
        table.add_row(row, "nothing" if context == "prompt" else context, *shown)
    show(table)


def summary(plan: Plan, records: Sequence[Record], folder: str) -> dict[str, object]:
    """The outcome as JSON values."""
    failed = [record for record in records if not record.done]
    return {
        "folder": folder,
        "model": plan.model,
        "cells": len(plan.cells),
        "done": len(records) - len(failed),
        "failed": len(failed),
        "left": len(plan.cells) - len(records),
        "seconds": round(sum(record.seconds for record in records), 2),
        "accuracy": [
            {"method": row, "context": context, "task": task, "mean": fmean(values), "seeds": len(values)}
            for (row, context), by_task in _accuracies(records).items()
            for task, values in by_task.items()
        ],
        "failures": [
            {"method": record.cell.row, "task": record.cell.task, "seed": record.cell.seed, "error": record.error}
            for record in failed
        ],
    }


def _accuracies(records: Sequence[Record]) -> dict[tuple[str, str], dict[str, list[float]]]:
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for context, score in record.scores.items():
            found[record.cell.row, context][record.cell.task].append(score.accuracy)
    return found


def _entry(cell: Cell, seconds: Mapping[str, float | None], sizes: Mapping[str, Size]) -> dict[str, object]:
    return {
        "key": cell.key,
        "task": cell.task,
        "method": cell.method,
        "settings": dict(cell.settings),
        "seed": cell.seed,
        "to_run": cell.key in seconds,
        "expected_seconds": seconds.get(cell.key),
        "test_tokens": sizes[cell.task].prompts,
    }
