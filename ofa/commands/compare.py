"""`ofa compare`: run every method on every task and seed, and store each finished cell at once."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import AfterValidator, BaseModel, ConfigDict

from ofa.commands.console import is_quiet, notice, reports_errors, show_json, warn, was_interrupted
from ofa.commands.options import (
    ChatOption,
    ChatOptions,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LabelColumnOption,
    ModelOption,
    OfflineOption,
    QuietOption,
    SeparatorOption,
    SystemOption,
    TextColumnOption,
    TrustOption,
)
from ofa.files import at_home

if TYPE_CHECKING:
    from ofa.comparison.engines.machines import Machines
    from ofa.comparison.grid import Grid
    from ofa.comparison.plan import Plan, Size, TaskPlan
    from ofa.comparison.records import Record


class RunOptions(BaseModel):
    """Options for the results."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: Annotated[Path, AfterValidator(at_home)]
    retry_failed: bool = False
    drop_demonstrations: bool = False
    dry_run: bool = False
    as_json: bool = False


@reports_errors
def compare(
    context: typer.Context,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks, separated by commas: names of the paper's tasks (sst2, trec, …) or of demo tasks (reviews, "
            "tickets, questions), or folders with task.json, train.jsonl and test.jsonl."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results. If it has results, only missing cells run."),
    ] = None,
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
    chat: ChatOption = None,
    system: SystemOption = None,
    text_column: TextColumnOption = None,
    label_column: LabelColumnOption = None,
    separator: SeparatorOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    device_map: Annotated[
        str | None,
        typer.Option(help="auto spreads a model that is too large for one GPU over all GPUs of its worker."),
    ] = None,
    engine: Annotated[str, typer.Option(help="local: processes of this machine. ray: actors of a Ray cluster.")] = (
        "local"
    ),
    workers: Annotated[
        int | None,
        typer.Option(help="Cells that run at once, each with a model of its own. Without it: one per GPU, or one."),
    ] = None,
    workers_per_gpu: Annotated[
        int,
        typer.Option(
            help="Workers that share a GPU, for small models that leave it idle. Each has its own copy of the model; "
            "its times are those of a busy GPU. Limited by the GPU's memory and the CPU's cores."
        ),
    ] = 1,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Address of a running Ray cluster, such as auto or host:6379. Without it one starts here."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads of each worker. Without it OMP_NUM_THREADS, else the idle cores, are divided among them."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts per batch when testing.")] = 16,
    order: Annotated[
        str,
        typer.Option(
            help="slow-first: within a task, slow methods run first, so all workers finish together. quick-first: most "
            "methods are done early."
        ),
    ] = "slow-first",
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run the cells again that failed in an earlier run.")
    ] = False,
    drop_demonstrations: Annotated[
        bool,
        typer.Option(
            "--drop-demonstrations",
            help="Leave out the first demonstrations if they do not fit the model's window, instead of refusing.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and list the cells with estimated times; run nothing.")
    ] = False,
    offline: OfflineOption = False,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Compare adaptation methods: every method on every task and every seed, the same shots for all of them.

    Example: ofa compare --tasks sst2,trec --seeds 42-46 --out results, then: ofa report results

    Each finished cell (task, method, seed) is written to results.jsonl at once.
    Ctrl-C, a kill or a full disk lose only the cells in progress; the same command continues.

    In a YAML file methods may have settings, and a list of values makes a row of each:
    methods: {norm-tuning: , ofa: {sharpness: [0.001, 0.01], epochs: 30}}
    """
    from ofa.comparison.engines.machines import Machines, check_machines
    from ofa.comparison.grid import Grid, checked_part
    from ofa.comparison.plan import read_tasks
    from ofa.models.load import check_source

    values = context.params
    grid, machines, run_options = (
        checked_part(Grid, values),
        checked_part(Machines, values),
        checked_part(RunOptions, values),
    )
    check_source(grid.model, dtype=grid.dtype, device=machines.device)
    task_plans = read_tasks(grid, offline=machines.offline)
    check_machines(machines)
    plan, sizes = _plan(grid, task_plans, machines, run_options)
    from ofa.commands.compared import show_scores, summary

    if run_options.dry_run:
        _dry_run(plan, sizes, machines, run_options)
        return
    records = _run(plan, machines, run_options)
    if run_options.as_json:
        show_json(summary(plan, records, str(run_options.out)))
    else:
        show_scores(records)
        notice(f"try: ofa report {run_options.out}")
    failed = sum(not record.done for record in records)
    if failed:
        warn(f"{failed} of {len(records)} cells failed; the same command with --retry-failed runs them again")
        raise SystemExit(1)


def _plan(
    grid: Grid, tasks: dict[str, TaskPlan], machines: Machines, run_options: RunOptions
) -> tuple[Plan, Mapping[str, Size]]:
    """The cells, after all checks that do not need the weights."""
    from ofa.commands.adapted import tell_chat
    from ofa.comparison.plan import Plan, asked_chats, check_window, sizes
    from ofa.models.introspection import model_window
    from ofa.models.load import load_tokenizer

    loaded = load_tokenizer(
        grid.model, offline=machines.offline, trust_remote_code=machines.trust_remote_code, progress=notice
    )
    name, plain = next(iter(tasks.items()))
    tasks = asked_chats(tasks, loaded.tokenizer, grid)
    tell_chat(plain.task, tasks[name].task, ChatOptions(grid.chat, grid.system), loaded.tokenizer)
    measured = sizes(tasks, loaded.tokenizer)
    if not run_options.drop_demonstrations:
        check_window(measured, model_window(loaded))
    for name, task in tasks.items():
        if len(task.tested) < grid.test_size:
            warn(f"{name} is tested on {len(task.tested)} examples, as many as its classes have")
    return Plan(grid, loaded.name, tasks), measured


def _run(plan: Plan, machines: Machines, run_options: RunOptions) -> tuple[Record, ...]:
    """Run the missing cells, and return the records of all cells of the plan."""
    from ofa.comparison.engines.machines import open_engine
    from ofa.comparison.progress import Tally, shown
    from ofa.comparison.run import run_cells
    from ofa.comparison.store import opened

    with opened(run_options.out) as results:
        plan.check_against(results.records)
        cells = plan.missing(results.records, retry_failed=run_options.retry_failed)
        notice(f"ofa: {len(plan.cells) - len(cells)} of {len(plan.cells)} cells are there, {len(cells)} to run")
        if cells:
            # Workers elsewhere need an absolute path; a hub id or the default is passed as typed.
            model = plan.model if Path(plan.model).is_absolute() else plan.grid.model
            source = machines.source(model, plan.grid.dtype)
            try:
                with (
                    open_engine(machines, source) as engine,
                    shown(Tally(cells, results.records, engine.workers), quiet=is_quiet()) as progress,
                ):
                    run_cells(plan, cells, results, engine, progress, _described(plan, machines))
            except BaseException as error:
                if not was_interrupted(error):
                    raise
                left = len(plan.missing(results.records))
                raise KeyboardInterrupt(f"stopped with {left} cells to run; the same command continues") from None
        wanted = {cell.key for cell in plan.cells}
        return tuple(record for record in results.records if record.cell.key in wanted)


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


def _dry_run(plan: Plan, sizes: Mapping[str, Size], machines: Machines, run_options: RunOptions) -> None:
    """List the cells with estimated times; nothing is written."""
    from ofa.commands.compared import show_plan
    from ofa.comparison.engines.machines import foreseen_workers
    from ofa.comparison.store import RESULTS, read_records

    records = read_records(run_options.out) if (run_options.out / RESULTS).is_file() else []
    plan.check_against(records)
    cells = plan.missing(records, retry_failed=run_options.retry_failed)
    show_plan(plan, cells, records, sizes, foreseen_workers(machines), run_options.as_json)
