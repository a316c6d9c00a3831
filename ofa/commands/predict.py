"""`ofa predict`: label new texts with an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ofa.commands.console import notice, progress_bar, show_json, show_table, tell_truncated, warn
from ofa.commands.options import (
    FORMATS,
    BatchOption,
    JsonOption,
    ModelOptions,
    SeparatorOption,
    TextColumnOption,
    ThreadsOption,
    command,
    set_threads,
)
from ofa.errors import InputError

if TYPE_CHECKING:
    from ofa.commands.predictions import Naming, PredictionFile, Survey
    from ofa.evaluation.scorer import Scorer
    from ofa.tasks import Task
    from ofa.tasks.tables import Row, Table

_BATCHES = 64
"""Batches that are sorted by length and written together; a stopped run loses at most these."""


@command
def predict(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder that `ofa fit` wrote.")],
    source: ModelOptions,
    text: Annotated[list[str] | None, typer.Option(help="A text to label; may be given several times.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "--file",
            help=f"A file with the columns of the adapter's template ({FORMATS}), or a .txt file with one text per "
            "line; - reads lines from standard input.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .csv or .jsonl file for the columns of --data with the label and the probability of each label. "
            "The file appears when it is complete."
        ),
    ] = None,
    text_column: TextColumnOption = None,
    separator: SeparatorOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the file of a run that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    gguf: Annotated[
        Path | None,
        typer.Option(
            help="A GGUF file that `ofa merge --gguf` made with this adapter, to be run by llama.cpp in place of the "
            "base (`pip install llama-cpp-python`)."
        ),
    ] = None,
    abstain_below: Annotated[
        float,
        typer.Option(min=0, max=1, help="Give no label where the most probable one has less than this probability."),
    ] = 0.0,
    threads: ThreadsOption = None,
    batch_size: BatchOption = 16,
    as_json: JsonOption = False,
) -> None:
    """Label new texts with an adapter, with a probability for each label.

    Example: ofa predict adapter --text "a tedious film" --json

    For a file: ofa predict adapter --data films.csv --out labelled.csv

    Rows keep their order; a row without text gets no label.
    Ctrl-C stops a run with --out, and the same command with --resume continues it.
    """
    from ofa.commands.adapted import adapter_digest, open_merged, open_model, read_task, task_of_texts, with_base
    from ofa.commands.predictions import Naming, PredictionFile, check_out, survey
    from ofa.tasks.tables import TEXT_SUFFIXES, Table, suffix_of

    if out is not None:
        check_out(out, overwrite=overwrite)
    named = str(gguf) if gguf else source.model
    if gguf is None:
        source = with_base(source, adapter)
    elif source != ModelOptions(offline=source.offline):
        raise InputError("--gguf holds the base, and llama.cpp runs it: leave out --model, --dtype and --device")
    task = read_task(adapter, text_column)
    if data is None or suffix_of(data) in TEXT_SUFFIXES:
        task = task_of_texts(task, data or "--text")
    rows = _Rows(text or [], Table(data, separator, texts=task.columns.names[0]) if data else None, task)
    found = survey(rows, task)
    if not found.rows:
        raise InputError(f"there is no text to label{f' in {data}' if data else ''}; give --text or --data")
    if abstain_below and task.open_ended:
        raise InputError("the adapter's task has no labels to abstain from: leave out --abstain-below")
    from ofa.adapters.folder import read_details
    from ofa.evaluation.calibration import calibration_from
    from ofa.evaluation.scorer import Scorer

    calibration = calibration_from(read_details(adapter), task.labels)
    set_threads(threads)
    subject = open_merged(gguf, adapter) if gguf else open_model(source, adapter)
    scorer = Scorer(subject.model, subject.tokenizer, task, batch_size=batch_size, calibration=calibration)
    naming = Naming(found.columns, task.labels, abstain_below)
    if out is not None:
        made_with = {
            "adapter": adapter_digest(adapter),
            "model": named,
            "dtype": source.dtype,
            "template": task.to_dict(),
            "abstain_below": abstain_below,
            "calibration": calibration and calibration.to_dict(),
        }
        file = PredictionFile(out, naming, made_with)
        with file.opened(resume=resume, overwrite=overwrite):
            _write(file, rows, scorer, found)
        withheld = file.withheld
        notice(f"{found.rows:,} rows: {out}")
    else:
        answers = [answer for _, part in _answered(rows, scorer, naming, found.rows) for answer in part]
        withheld = naming.withheld(answers) if task.labels else 0
        if as_json:
            show_json(answers)
        else:
            _show(answers, naming, task)
    if abstain_below:
        notice(f"{withheld:,} of {found.rows:,} rows have no label: every label is below {abstain_below:g}")
    tell_truncated(scorer.truncated)
    if found.blank:
        warn(f"{found.blank} of the {found.rows} rows have no text, so they get no label")


@dataclass(frozen=True)
class _Rows:
    """The rows to predict: single texts, then those of a table; can be iterated repeatedly."""

    texts: list[str]
    table: Table | None
    task: Task

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        for position, text in enumerate(self.texts, start=1):
            where = f"--text number {position}"
            yield where, {self.task.columns.names[0]: self.task.text_of(text, where)}
        yield from self.table or ()


def _write(file: PredictionFile, rows: _Rows, scorer: Scorer, found: Survey) -> None:
    try:
        for part, answers in _answered(file.remaining(rows), scorer, file.naming, found.rows, done=file.rows):
            file.append(part, answers)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped with {file.rows:,} of {found.rows:,} rows written; the same command with --resume continues"
        ) from None


def _answered(
    rows: Iterable[tuple[str, Row]], scorer: Scorer, naming: Naming, total: int, *, done: int = 0
) -> Iterator[tuple[list[Row], list[Row]]]:
    """Chunks of the rows with their answers."""
    left = iter(rows)
    with progress_bar("predicting") as update:
        while part := list(islice(left, _BATCHES * scorer.batch_size)):

            def progress(now: int, _: int, before: int = done) -> None:
                update(before + now, total, "")

            yield [row for _, row in part], _answers(part, scorer, naming, progress)
            done += len(part)


def _answers(
    part: list[tuple[str, Row]], scorer: Scorer, naming: Naming, progress: Callable[[int, int], None]
) -> list[Row]:
    columns, labels = scorer.task.columns, scorer.task.labels
    answers = [naming.answer(row, None, None) for _, row in part]
    found = [columns.text_or_none(row, where) for where, row in part]
    filled = [index for index, text in enumerate(found) if text is not None]
    texts = [text for text in found if text is not None]
    if not labels:
        for index, completion in zip(filled, scorer.generate(texts, progress=progress), strict=True):
            answers[index] = naming.answer(part[index][1], completion, None)
        return answers
    probabilities = scorer.predict_proba(texts, progress=progress)
    for index, best, each in zip(filled, probabilities.argmax(1).tolist(), probabilities.tolist(), strict=True):
        answers[index] = naming.answer(part[index][1], labels[best], each)
    return answers


def _show(answers: list[Row], naming: Naming, task: Task) -> None:
    from ofa.tasks.columns import find_column

    columns = (naming.label, "probability") if task.labels else (naming.completion,)
    rows = []
    for answer in answers:
        cells = [answer[columns[0]]]
        if task.labels:
            by_label: Any = answer[naming.probabilities]
            cells.append(by_label and f"{max(by_label.values()):.3f}")
        rows.append([*cells, *(answer[find_column(name, answer, "the row")] for name in task.columns.names)])
    show_table((*columns, *task.columns.names), rows)
