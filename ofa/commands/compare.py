"""`ofa compare`: run every method on every task and seed, and store each finished cell at once."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ofa.commands.console import notice, progress_bar, show_json, warn, was_interrupted
from ofa.commands.options import (
    ChatOptions,
    JsonOption,
    LabelColumnOption,
    ModelOptions,
    SeparatorOption,
    TextColumnOption,
    command,
)

if TYPE_CHECKING:
    from ofa.comparison.grid import Grid
    from ofa.comparison.placement import Machines, Placement
    from ofa.comparison.plan import Plan, TaskPlan
    from ofa.comparison.records import Record


@command
def compare(
    *,
    context: typer.Context,
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks, separated by commas: names of the paper's tasks (sst2, trec, …) or of demo tasks (reviews, "
            "tickets, questions), or folders with task.json, train.jsonl and test.jsonl."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results. If it has results, only missing cells run.")],
    methods: Annotated[str, typer.Option(help="Methods, separated by commas, or all.")] = "all",
    seeds: Annotated[
        str, typer.Option(help="A range such as 42-46, or a list. A seed draws the shots, the same for all methods.")
    ] = "42-46",
    shots: Annotated[int, typer.Option(help="Examples per class to learn from.")] = 5,
    test_size: Annotated[
        int, typer.Option(help="Test examples per task, class-balanced, the same for all methods and seeds.")
    ] = 500,
    contexts: Annotated[
        str,
        typer.Option(help="In front of a tested text: nothing (prompt), the shots (demonstrations), or both in turn."),
    ] = "prompt,demonstrations",
    turns: ChatOptions,
    text_column: TextColumnOption = None,
    label_column: LabelColumnOption = None,
    separator: SeparatorOption = None,
    source: ModelOptions,
    device_map: Annotated[
        str | None,
        typer.Option(help="auto spreads a model that is too large for one GPU over all GPUs of its worker."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Cells that run at once, each with a model of its own. Without it: one per GPU, or one."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads of each worker. Without it OMP_NUM_THREADS, else the idle cores, are divided among them."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts per batch when testing.")] = 16,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run the cells again that failed in an earlier run.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare adaptation methods: every method on every task and every seed, the same shots for all of them.

    Example: ofa compare --tasks sst2,trec --seeds 42-46 --out results, then: ofa report results

    Each finished cell (task, method, seed) is written to results.jsonl at once.
    Ctrl-C, a kill or a full disk lose only the cells in progress; the same command continues.

    In a YAML file methods may have settings, and a list of values makes a row of each:
    methods: {norm-tuning: , ofa: {sharpness: [0.001, 0.01], epochs: 30}}
    """
    from ofa.comparison.grid import Grid, checked_part
    from ofa.comparison.placement import Machines
    from ofa.comparison.plan import read_tasks
    from ofa.models.load import check_source

    grid, machines = checked_part(Grid, context.params), checked_part(Machines, context.params)
    check_source(grid.model, dtype=grid.dtype, device=machines.device)
    task_plans = read_tasks(grid, offline=machines.offline)
    placements = machines.placements()
    plan = _plan(grid, task_plans, machines)
    from ofa.commands.compared import show_scores, summary

    records = _run(plan, machines, placements, out, retry_failed=retry_failed)
    if as_json:
        show_json(summary(plan, records, str(out)))
    else:
        show_scores(records)
        notice(f"try: ofa report {out}")
    failed = sum(not record.done for record in records)
    if failed:
        warn(f"{failed} of {len(records)} cells failed; the same command with --retry-failed runs them again")
        raise SystemExit(1)


def _plan(grid: Grid, tasks: dict[str, TaskPlan], machines: Machines) -> Plan:
    """The cells, after all checks that do not need the weights."""
    from ofa.commands.adapted import tell_chat
    from ofa.comparison.plan import Plan, asked_chats, check_window
    from ofa.models.introspection import model_window
    from ofa.models.load import load_tokenizer

    loaded = load_tokenizer(
        grid.model, offline=machines.offline, trust_remote_code=machines.trust_remote_code, progress=notice
    )
    tell_chat(next(iter(tasks.values())).task, ChatOptions(grid.chat, grid.system), loaded.tokenizer)
    tasks = asked_chats(tasks, loaded.tokenizer, grid)
    check_window(tasks, loaded.tokenizer, model_window(loaded), grid)
    for name, task in tasks.items():
        if len(task.tested) < grid.test_size:
            warn(f"{name} is tested on {len(task.tested)} examples, as many as its classes have")
    return Plan(grid, loaded.name, tasks)


def _run(
    plan: Plan, machines: Machines, placements: Sequence[Placement], out: Path, *, retry_failed: bool
) -> tuple[Record, ...]:
    """Run the missing cells, and return the records of all cells of the plan."""
    from ofa.comparison import workers
    from ofa.comparison.run import run_cells
    from ofa.comparison.store import opened

    with opened(out) as results:
        plan.check_against(results.records)
        cells = plan.missing(results.records, retry_failed=retry_failed)
        notice(f"ofa: {len(plan.cells) - len(cells)} of {len(plan.cells)} cells are there, {len(cells)} to run")
        if cells:
            # A folder by its absolute path; a hub id or the default as typed.
            model = plan.model if Path(plan.model).is_absolute() else plan.grid.model
            options = machines.model_dump(include={"device_map", "trust_remote_code", "offline"})
            source = workers.Source({"model": model, "dtype": plan.grid.dtype, **options}, machines.batch_size)
            events = workers.run_in_workers(cells, plan.job, source, placements)
            try:
                with _progress(len(cells)) as finished:
                    run_cells(plan.model, events, results, finished, notice, _described(plan, machines))
            except BaseException as error:
                if not was_interrupted(error):
                    raise
                left = len(plan.missing(results.records))
                raise KeyboardInterrupt(f"stopped with {left} cells to run; the same command continues") from None
        wanted = {cell.key for cell in plan.cells}
        return tuple(record for record in results.records if record.cell.key in wanted)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Record], None]]:
    """A line for each finished cell, and a bar of all of them on a terminal."""
    from ofa.commands.compared import told

    done = failed = 0
    with progress_bar("comparing") as update:
        update(0, total, "loading the model")

        def finished(record: Record) -> None:
            nonlocal done, failed
            done, failed = done + 1, failed + (not record.done)
            notice(f"ofa: {told(record)}")
            update(done, total, f"{failed} failed" if failed else "")

        yield finished


def _described(plan: Plan, machines: Machines) -> dict[str, object]:
    """The entry of a run in `run.json`."""
    from ofa.comparison.environment import library_versions, now
    from ofa.comparison.plan import TEST_SEED

    return {
        "command": shlex.join(["ofa", *sys.argv[1:]]),
        "started": now(),
        "model": plan.model,
        "grid": plan.grid.as_json(),
        "machines": machines.model_dump(),
        "test_seed": TEST_SEED,
        "versions": library_versions(),
        "cells": [cell.key for cell in plan.cells],
    }
