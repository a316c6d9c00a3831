"""Print the output of `ofa compare`: each finished cell, and the scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from ofa.commands.console import show_table
from ofa.comparison.plan import Plan
from ofa.comparison.records import Record
from ofa.report.formatting import seconds


def told(record: Record) -> str:
    """A finished cell in one line."""
    cell = f"{record.cell.task}, {record.cell.row}, seed {record.cell.seed}"
    if not record.done:
        return f"{cell}: failed: {record.error}"
    scores = ", ".join(f"{score.accuracy:.3f} ({context})" for context, score in record.scores.items())
    return f"{cell}: accuracy {scores} in {seconds(record.seconds)}"


def show_scores(records: Sequence[Record]) -> None:
    """Show the mean accuracy over the seeds, by row and task; `ofa report` adds the statistics."""
    tasks = list(dict.fromkeys(record.cell.task for record in records))
    rows = [
        (
            row,
            "nothing" if context == "prompt" else context,
            *(f"{fmean(by_task[task]):.3f}" if task in by_task else "" for task in tasks),
        )
        for (row, context), by_task in _accuracies(records).items()
    ]
    show_table(["method", "in front of a text", *tasks], rows, title="accuracy, mean over seeds", left=2)


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
