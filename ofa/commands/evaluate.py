"""`ofa evaluate`: how good an adapter, or the bare model, is on labelled examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ofa.commands.console import notice, progress_bar, reports_errors, show, show_json, tell_truncated
from ofa.commands.options import (
    DATA_FILES,
    BatchOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LabelColumnOption,
    LabelsOption,
    ModelOption,
    OfflineOption,
    QuietOption,
    SeparatorOption,
    ShotsOption,
    TemplateOption,
    TextColumnOption,
    ThreadsOption,
    TrustOption,
    set_threads,
)
from ofa.errors import InputError

if TYPE_CHECKING:
    from ofa.commands.adapted import Adapted
    from ofa.evaluation.scorer import Evaluation
    from ofa.models.load import LoadedModel
    from ofa.tasks import Example, Shots, Task


@reports_errors
def evaluate(
    data: Annotated[
        str, typer.Option(help=f"Labelled examples: {DATA_FILES}, a folder with task.json, or a task's name.")
    ],
    adapter: Annotated[
        Path | None, typer.Argument(help="Adapter folder. Without it the bare model is evaluated (zero-shot).")
    ] = None,
    demonstrations: Annotated[
        str | None,
        typer.Option(
            help="Training examples to put in context; with an adapter, the very shots it was tuned on are taken."
        ),
    ] = None,
    shots: ShotsOption = 5,
    seed: Annotated[int, typer.Option(help="Draws the demonstrations and the test subset.")] = 42,
    size: Annotated[
        int | None, typer.Option(min=1, help="Evaluate on a class-balanced subset of this many examples.")
    ] = None,
    template: TemplateOption = None,
    labels: LabelsOption = None,
    text_column: TextColumnOption = None,
    label_column: LabelColumnOption = None,
    separator: SeparatorOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    batch_size: BatchOption = 16,
    offline: OfflineOption = False,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Score an adapter, or the bare model, on labelled examples: accuracy, macro-F1, confusion, calibration.

    Example: ofa evaluate adapter --data test.jsonl --json
    """
    from ofa.commands.adapted import base_of
    from ofa.commands.data import data_origin, test_data
    from ofa.models.load import check_source
    from ofa.tasks import class_balanced

    columns = {"text_column": text_column, "label_column": label_column}
    check_source(base_of(adapter, model) if adapter else model, dtype=dtype, device=device)
    task, details = _task(adapter, data, template, labels, columns, separator, offline)
    examples = test_data(data, task, separator=separator, offline=offline)
    if size is not None:
        examples = class_balanced(examples, task.labels, size, seed)
    shown = _demonstrations(demonstrations, task, details, shots, seed, separator, offline)
    from ofa.evaluation.scorer import evaluate as measure

    set_threads(threads)
    where = {"dtype": dtype, "device": device, "offline": offline, "trust_remote_code": trust_remote_code}
    subject = _subject(adapter, model, where)
    with progress_bar("evaluating") as update:
        result = measure(
            subject.model,
            subject.tokenizer,
            task,
            examples,
            demonstrations=shown,
            batch_size=batch_size,
            progress=lambda done, total: update(done, total, ""),
        )
    tell_truncated(result.truncated)
    document = {
        "adapter": str(adapter) if adapter else None,
        "data": data,
        "task": task.to_dict(),
        "demonstrations": len(shown),
        "scored": result.mode,
        "truncated": result.truncated,
        "seconds": round(result.seconds, 2),
        **result.metrics.to_dict(),
    }
    if as_json:
        show_json(document)
    else:
        _show(result, document, data_origin(data)["name"])


def _task(
    adapter: Path | None,
    data: str,
    template: str | None,
    labels: str | None,
    columns: dict[str, str | None],
    separator: str | None,
    offline: bool,
) -> tuple[Task, dict[str, Any]]:
    """What is asked, by the adapter or by the options, and what the adapter says of itself."""
    from ofa.adapters.folder import read_details
    from ofa.commands.adapted import read_task
    from ofa.commands.data import training_data

    if adapter is None:
        return training_data(data, template, labels, **columns, separator=separator, offline=offline).task, {}
    if template or labels:
        raise InputError(f"{adapter} brings its own template and labels; leave out --template and --labels")
    return read_task(adapter, **columns), read_details(adapter)


def _subject(adapter: Path | None, model: str | None, where: dict[str, Any]) -> Adapted | LoadedModel:
    from ofa.commands.adapted import open_adapter
    from ofa.models.load import load_model

    return open_adapter(adapter, model, **where) if adapter else load_model(model, progress=notice, **where)


def _demonstrations(
    source: str | None,
    task: Task,
    details: dict[str, Any],
    shots: Shots,
    seed: int,
    separator: str | None,
    offline: bool,
) -> tuple[Example, ...]:
    """The examples to put in context: an adapter's own shots by their indices, or a fresh draw."""
    if source is None:
        return ()
    from ofa.commands.data import demonstration_pool
    from ofa.tasks import FewShot, few_shot

    pool = demonstration_pool(source, task, separator=separator, offline=offline)
    indices = details.get("indices")
    if indices is None:
        return few_shot(pool, task.labels, shots, seed).examples
    if max(indices) >= len(pool):
        raise InputError(
            f"{source} has {len(pool)} examples, but the adapter was tuned on number {max(indices) + 1}; "
            "give the file it was tuned on"
        )
    drawn = FewShot(tuple(pool[index] for index in indices), tuple(indices))
    if drawn.sha256 != details.get("shots_sha256", drawn.sha256):
        raise InputError(f"{source} does not hold the examples the adapter was tuned on; give the file it was tuned on")
    return drawn.examples


def _show(result: Evaluation, document: dict[str, Any], evaluated: str) -> None:
    from rich.table import Table

    summary = Table(title=f"{evaluated}: {document['count']} examples, {document['seconds']:.1f} s")
    names = ("accuracy", "macro_f1", "expected_calibration_error", "exact_match", "negative_log_likelihood")
    shown = [name for name in names if name in document]
    for name in shown:
        summary.add_column(name.replace("_", " "), justify="right")
    summary.add_row(*(f"{document[name]:.4f}" for name in shown))
    show(summary)
    if "confusion" not in document:
        return
    confusion = Table(title="confusion: rows are true, columns predicted")
    confusion.add_column("")
    for label in document["labels"]:
        confusion.add_column(label, justify="right")
    for label, row in zip(document["labels"], document["confusion"], strict=True):
        confusion.add_row(label, *map(str, row))
    show(confusion)
