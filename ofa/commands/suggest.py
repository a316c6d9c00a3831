"""`ofa suggest`: choose the texts to label next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ofa.commands.console import notice, progress_bar, show_json, show_table, tell_truncated
from ofa.commands.options import (
    FORMATS,
    BatchOption,
    ChatOptions,
    DataOptions,
    JsonOption,
    ModelOptions,
    ThreadsOption,
    command,
    set_threads,
)
from ofa.errors import InputError

if TYPE_CHECKING:
    from ofa.evaluation.scorer import Progress
    from ofa.methods.active_learning import Choice
    from ofa.tasks import Task
    from ofa.tasks.tables import Row

_ADDED = ("predicted_label", "probability", "margin", "reason")


@command
def suggest(
    data: Annotated[
        str,
        typer.Option(
            help=f"Texts without labels: a file with the columns of the template ({FORMATS}), or a .txt file with one "
            "text per line; - reads lines from standard input. "
            "A row with a label is left out."
        ),
    ],
    how: DataOptions,
    turns: ChatOptions,
    source: ModelOptions,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Adapter folder. Without it the bare model is asked; give --template and --labels."),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many texts to suggest.")] = 20,
    labelled: Annotated[
        str | None,
        typer.Option(help="A file of texts that have labels, such as the --data of `ofa fit`; they are left out."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .csv or .jsonl file for the rows, with an empty column to fill in; then it is data for `ofa fit`."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    threads: ThreadsOption = None,
    batch_size: BatchOption = 16,
    as_json: JsonOption = False,
) -> None:
    """Choose texts to label next: those that the model is least sure of, and unlike each other.

    Example: ofa suggest --data unlabelled.jsonl --adapter adapter -n 20 --out to_label.csv

    The candidates are the ten times N texts with the smallest margin between the two most probable labels.
    The first suggestion has the smallest margin; each next one is the farthest from the others in hidden states.

    Fill in the column of labels, add the rows to your training file, and run `ofa fit` again.
    Measured on the embedded tasks, ten such texts taught no more than ten random ones (docs/choosing.md).
    """
    from ofa.adapters.folder import read_details
    from ofa.commands.adapted import asked_chat, check_chat, open_model, with_base
    from ofa.commands.predictions import check_out, write_rows

    if out is not None:
        check_out(out, overwrite=overwrite)
    adapters = [adapter] if adapter else []
    check_chat(turns, adapters)
    source = with_base(source, adapter)
    task = _task(adapter, data, how)
    pool = _pool(data, labelled, task, how.separator)
    from ofa.evaluation.calibration import calibration_from
    from ofa.evaluation.scorer import Scorer
    from ofa.methods.active_learning import choose

    calibration = calibration_from(read_details(adapter), task.labels) if adapter else None
    set_threads(threads)
    subject = open_model(source, adapter)
    task = asked_chat(task, turns, subject.tokenizer, adapters)
    scorer = Scorer(subject.model, subject.tokenizer, task, batch_size=batch_size, calibration=calibration)
    with progress_bar("suggesting") as update:

        def stage(name: str) -> Progress:
            return lambda done, total: update(done, total, name)

        choices = choose(scorer, pool.texts, count, stage)
    rows = _rows(pool, choices, task)
    if out is not None:
        write_rows(out, rows)
    if as_json:
        show_json(rows)
    elif out is None:
        _show(rows, task)
    tell_truncated(scorer.truncated)
    margins = [choice.margin for choice in choices]
    sure = f"margins {min(margins):.2f} to {max(margins):.2f}"
    where = f": {out}" if out else ""
    notice(f"{len(rows):,} of {len(pool.texts):,} texts suggested, {sure}{where}{pool.left_out}")


@dataclass(frozen=True)
class _Pool:
    """The distinct texts without labels, their rows, the columns of the file, and what was left out, in words."""

    texts: list[str]
    rows: list[Row]
    columns: tuple[str, ...]
    left_out: str


def _task(adapter: Path | None, data: str, how: DataOptions) -> Task:
    """The adapter's task, or that of --template and --labels.

    Raises:
        InputError: neither or both are given, or the task has no labels.
    """
    from ofa.commands.adapted import read_task, task_of_texts
    from ofa.commands.data import split_labels
    from ofa.tasks import Task, unescape_template
    from ofa.tasks.tables import TEXT_SUFFIXES, suffix_of

    if adapter is not None:
        if how.template or how.labels:
            raise InputError(f"{adapter} brings its own template and labels: leave out --template and --labels")
        task = read_task(adapter, how.text_column, how.label_column)
        if task.open_ended:
            raise InputError(f"the task of {adapter} has no labels to be uncertain between: choose texts by hand")
    elif how.template and how.labels:
        columns = (how.text_column or "", how.label_column or "")
        task = Task("data", unescape_template(how.template), split_labels(how.labels), *columns)
    else:
        raise InputError("the labels to be uncertain between are unknown: give --adapter, or --template and --labels")
    return task_of_texts(task, data) if suffix_of(data) in TEXT_SUFFIXES else task


def _pool(data: str, labelled: str | None, task: Task, separator: str | None) -> _Pool:
    """The texts of the file that have no label, neither there nor in the file `labelled`.

    Raises:
        InputError: a file cannot be read, or no text is left.
    """
    known = {text for text, _ in _texts_of(labelled, task, separator)} if labelled else set()
    columns: dict[str, None] = {}
    rows: dict[str, Row] = {}
    left: Counter[str] = Counter()
    read = list(_texts_of(data, task, separator))
    known |= {text for text, row in read if str(row.get(_label_column(row, task)) or "").strip()}
    for text, row in read:
        columns.update(dict.fromkeys(row))
        why = "blank" if text is None else "with labels" if text in known else "repeated" if text in rows else None
        if why is not None:
            left[why] += 1
        elif text is not None:
            rows[text] = row
    left_out = ", ".join(f"{number:,} {why}" for why, number in left.items())
    if not rows:
        raise InputError(f"{data} has no text to label ({left_out or 'it is empty'}): give texts without labels")
    return _Pool(list(rows), list(rows.values()), tuple(columns), left_out and f"; left out: {left_out}")


def _texts_of(data: str, task: Task, separator: str | None) -> Iterator[tuple[str | None, Row]]:
    from ofa.tasks.tables import Table

    names = task.columns.names
    for where, row in Table(data, separator, texts=names[0] if len(names) == 1 else None):
        yield task.columns.text_or_none(row, where), row


def _label_column(columns: Iterable[str], task: Task) -> str:
    """The column of labels, also if its name differs in case; the task's name for it if there is none."""
    wanted = task.label_column.casefold()
    return next((name for name in columns if name.strip().casefold() == wanted), task.label_column)


def _rows(pool: _Pool, choices: Sequence[Choice], task: Task) -> list[Row]:
    """The chosen rows with their own columns, an empty label, and why they were chosen."""
    from ofa.commands.predictions import free_name

    label = _label_column(pool.columns, task)
    predicted, probability, margin, reason = (free_name(name, {*pool.columns, label}, "suggested_") for name in _ADDED)
    return [
        {
            **dict.fromkeys(pool.columns),
            **pool.rows[choice.index],
            label: None,
            predicted: choice.label,
            probability: choice.probability,
            margin: choice.margin,
            reason: f"{'unlike those above' if position else 'smallest margin'}; next is {choice.runner_up}",
        }
        for position, choice in enumerate(choices)
    ]


def _show(rows: list[Row], task: Task) -> None:
    from ofa.tasks.columns import find_column

    columns = [*list(rows[0])[-len(_ADDED) :], *(find_column(name, rows[0], "the row") for name in task.columns.names)]
    cells = ((row[name] for name in columns) for row in rows)
    show_table(columns, ([f"{one:.3f}" if isinstance(one, float) else one for one in row] for row in cells))
