"""`ofa evaluate`: score an adapter, or the bare model, on labelled examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ofa.commands.console import notice, progress_bar, show_json, show_table, tell_truncated
from ofa.commands.options import (
    DATA_FILES,
    BatchOption,
    ChatOptions,
    DataOptions,
    JsonOption,
    ModelOptions,
    ShotsOption,
    ThreadsOption,
    command,
    set_threads,
)
from ofa.errors import InputError
from ofa.files import Json

if TYPE_CHECKING:
    from ofa.evaluation.calibration import Calibration
    from ofa.evaluation.scorer import Evaluation
    from ofa.tasks import Example, Shots, Task


_CALIBRATED = ("accuracy", "expected_calibration_error", "negative_log_likelihood", "brier_score")
"""The metrics that a calibration changes."""
_HEADINGS = {
    "expected_calibration_error": "calibration error",
    "negative_log_likelihood": "log loss",
    "brier_score": "Brier score",
    "macro_f1": "macro F1",
    "exact_match": "exact match",
}


@command
def evaluate(
    data: Annotated[
        str, typer.Option(help=f"Labelled examples: {DATA_FILES}, a folder with task.json, or a task's name.")
    ],
    how: DataOptions,
    turns: ChatOptions,
    source: ModelOptions,
    adapter: Annotated[
        Path | None, typer.Argument(help="Adapter folder. Without it the bare model is evaluated (zero-shot).")
    ] = None,
    demonstrations: Annotated[
        str | None,
        typer.Option(help="Training examples to put in context; with an adapter, the shots it was tuned on."),
    ] = None,
    shots: ShotsOption = 5,
    seed: Annotated[int, typer.Option(help="Draws the demonstrations and the test subset.")] = 42,
    size: Annotated[
        int | None, typer.Option(min=1, help="Evaluate on a class-balanced subset of this many examples.")
    ] = None,
    threads: ThreadsOption = None,
    batch_size: BatchOption = 16,
    as_json: JsonOption = False,
) -> None:
    """Score an adapter, or the bare model, on labelled examples: accuracy, macro-F1, confusion, calibration.

    Example: ofa evaluate adapter --data test.jsonl --json
    """
    from ofa.adapters.folder import read_details
    from ofa.commands.adapted import asked_chat, asked_task, check_chat, open_model, with_base
    from ofa.commands.data import data_origin
    from ofa.tasks import class_balanced, examples_from

    adapters = [adapter] if adapter else []
    check_chat(turns, adapters)
    source = with_base(source, adapter)
    where: dict[str, Any] = {"separator": how.separator, "offline": source.offline}
    task = asked_task(adapters, data, how, offline=source.offline)
    examples = examples_from(data, task, **where)
    if size is not None:
        examples = class_balanced(examples, task.labels, size, seed)
    details = read_details(adapter) if adapter else {}
    shown = _demonstrations(demonstrations, task, details, shots, seed, where)
    from ofa.evaluation.calibration import calibration_from
    from ofa.evaluation.scorer import evaluate as measure

    set_threads(threads)
    subject = open_model(source, adapter)
    task = asked_chat(task, turns, subject.tokenizer, adapters, ["--demonstrations"] if shown else ())
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
    calibration = None if shown else calibration_from(details, task.labels)
    before = result.metrics.to_dict()
    if calibration is not None:
        result = _calibrated(result, calibration, examples, task.labels)
    elif details.get("calibration"):
        notice("the adapter's calibration is for prompts without demonstrations, and is not applied")
    document = {
        "adapter": str(adapter) if adapter else None,
        "data": data,
        "task": task.to_dict(),
        "demonstrations": len(shown),
        "scored": result.mode,
        "truncated": result.truncated,
        "seconds": round(result.seconds, 2),
        "calibration": calibration and calibration.to_dict(),
        "uncalibrated": {name: before[name] for name in _CALIBRATED} if calibration else None,
        **result.metrics.to_dict(),
    }
    if as_json:
        show_json(document)
    else:
        _show(document, data_origin(data)["name"])


def _calibrated(
    result: Evaluation, calibration: Calibration, examples: Sequence[Example], labels: Sequence[str]
) -> Evaluation:
    from ofa.evaluation.scores import metrics

    probabilities = calibration.apply(result.probabilities.log()).exp()
    return replace(
        result,
        metrics=metrics(probabilities, [example.label for example in examples], labels),
        predictions=tuple(labels[index] for index in probabilities.argmax(1).tolist()),
        probabilities=probabilities,
    )


def _demonstrations(
    source: str | None,
    task: Task,
    details: Json,
    shots: Shots,
    seed: int,
    where: dict[str, Any],
) -> tuple[Example, ...]:
    """The examples to put in context: an adapter's own shots by their indices, or a new draw."""
    if source is None:
        return ()
    from ofa.commands.data import demonstration_pool
    from ofa.tasks import FewShot, few_shot

    pool = demonstration_pool(source, task, **where)
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


def _show(document: Json, evaluated: str) -> None:
    title = f"{evaluated}: {document['count']} examples, {document['seconds']:.1f} s"
    shown = [name for name in (*_CALIBRATED, "macro_f1", "exact_match") if name in document]
    columns = [_HEADINGS.get(name, name) for name in shown]
    scores = [f"{document[name]:.4f}" for name in shown]
    before = document["uncalibrated"]
    if before:
        first = ("before calibration", *(f"{before[name]:.4f}" if name in before else "" for name in shown))
        second = (f"temperature {document['calibration']['temperature']:.2f}", *scores)
        show_table(["", *columns], [first, second], title=title, left=1)
    else:
        show_table(columns, [scores], title=title, left=0)
    if "confusion" not in document:
        return
    labels, confusion = document["labels"], document["confusion"]
    rows = [
        (one["label"], one["support"], sum(predicted), *(f"{one[name]:.3f}" for name in ("precision", "recall", "f1")))
        for one, predicted in zip(document["per_class"], zip(*confusion, strict=True), strict=True)
    ]
    show_table(("", "examples", "predicted", "precision", "recall", "F1"), rows, title="classes", left=1)
    rows = [(label, *row) for label, row in zip(labels, confusion, strict=True)]
    show_table(("true ↓ predicted →", *labels), rows, title="confusion", left=1)
