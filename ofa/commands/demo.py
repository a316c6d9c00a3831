"""`ofa demo`: compare four ways to use five examples per class on a real model."""

from __future__ import annotations

import time
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ofa.commands.console import losses_told, notice, progress_bar, show_json, show_table
from ofa.commands.options import (
    JsonOption,
    ModelOption,
    OfflineOption,
    OverwriteOption,
    ShotsOption,
    ThreadsOption,
    command,
    set_threads,
)
from ofa.files import Json

if TYPE_CHECKING:
    from ofa.adaptation import Adaptation
    from ofa.models.load import LoadedModel
    from ofa.tasks import Example, FewShot, TaskData

_ADAPTER = "adapter"
_FIGURE = "training.png"
_RESULTS = "demo.json"
_PLAIN = {"step_ratio": 0.0, "sharpness": 0.0, "relative": False}
"""Norm tuning as PEFT users know it: one learning rate for every scale, and nothing but the loss."""


@command
def demo(
    task: Annotated[str, typer.Option(help="Embedded task: tickets, reviews or questions.")] = "tickets",
    shots: ShotsOption = 5,
    seed: Annotated[int, typer.Option(help="Draws the shots and fixes everything random.")] = 42,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the shots; without it as many as in `ofa fit`.")
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="Test examples, class-balanced.")] = 100,
    out: Annotated[Path, typer.Option(help="Folder for the adapter and the figure.")] = Path("ofa-demo"),
    model: ModelOption = None,
    threads: ThreadsOption = None,
    overwrite: OverwriteOption = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Adapt a real model to an embedded task and compare: zero-shot, in-context learning, norm tuning, `ofa fit`.

    The first run downloads the default model (90 MB). It needs no GPU, and takes a few minutes.
    """
    from ofa.files import claimed_folder
    from ofa.models.load import check_source
    from ofa.tasks import class_balanced, few_shot, load_demo_task

    check_source(model)
    data = load_demo_task(task)
    drawn = few_shot(data.train, data.task.labels, shots, seed)
    tested = class_balanced(data.test, data.task.labels, size, seed)
    with claimed_folder(out, overwrite=overwrite or (out / _RESULTS).is_file()) as folder:
        from ofa.models.load import load_model

        set_threads(threads)
        loaded = load_model(model, offline=offline, progress=notice)
        notice(f"{loaded.name}, task {task}: {shots} examples per class, {len(tested)} test examples, seed {seed}")
        rows, document = _compare(loaded, data, drawn, tested, shots, seed, epochs, folder)
    if as_json:
        show_json({"rows": rows, **document})
        return
    _show(rows)
    notice(document["gain"])
    notice(f"adapter: {folder / _ADAPTER} ({document['adapter_bytes'] / 1000:.0f} kB), figure: {folder / _FIGURE}")
    example = data.test[0].text
    notice(f'try: ofa predict {folder / _ADAPTER} --text "{example}"')


def _compare(
    loaded: LoadedModel,
    data: TaskData,
    drawn: FewShot,
    tested: tuple[Example, ...],
    shots: int,
    seed: int,
    epochs: int | None,
    folder: Path,
) -> tuple[list[Json], Json]:
    from ofa.adapters.folder import WEIGHTS
    from ofa.commands.data import data_origin
    from ofa.files import write_json
    from ofa.training.figure import training_figure

    rows = [
        _row("zero-shot", loaded, data, tested, ()),
        _row("in-context learning", loaded, data, tested, drawn.examples),
    ]
    records = {}
    for name, settings in (("norm tuning (PEFT)", _PLAIN), ("ofa fit", {})):
        adaptation = _adapt(name, loaded, data, shots, seed, {"epochs": epochs, **settings})
        records[name] = adaptation.training.records
        rows.append(_row(name, loaded, data, tested, (), adaptation))
        if name == "ofa fit":
            scores = {name: rows[-1][name] for name in ("accuracy", "macro_f1")} | {"count": len(tested)}
            origin = data_origin(data.task.name)
            adaptation.save(
                folder / _ADAPTER,
                overwrite=True,
                data={"train": origin, "test": origin},
                scores=scores,
            )
        adaptation.close()
    training_figure(records, folder / _FIGURE)
    document = {
        "model": loaded.name,
        "task": data.task.name,
        "seed": seed,
        "shots": shots,
        "steps": len(records["ofa fit"]),
        "test_examples": len(tested),
        "adapter": str(folder / _ADAPTER),
        "adapter_bytes": (folder / _ADAPTER / WEIGHTS).stat().st_size,
        "figure": str(folder / _FIGURE),
        "gain": _gain(rows),
    }
    for row in rows:
        del row["right"]
    write_json(folder / _RESULTS, {"rows": rows, **document})
    return rows, document


def _adapt(name: str, loaded: LoadedModel, data: TaskData, shots: int, seed: int, settings: Json) -> Adaptation:
    from ofa.adaptation import adapt

    with progress_bar(name) as update:
        return adapt(
            loaded.model,
            loaded.tokenizer,
            data,
            shots,
            seed,
            chat=False,  # all rows have the same prompts, and demonstrations are not turns
            progress=losses_told(update),
            **settings,
        )


def _row(
    name: str,
    loaded: LoadedModel,
    data: TaskData,
    tested: tuple[Example, ...],
    demonstrations: tuple[Example, ...],
    adaptation: Adaptation | None = None,
) -> dict[str, object]:
    """The scores, times and size of one method."""
    from ofa.evaluation.scorer import evaluate
    from ofa.evaluation.scores import Metrics

    started = time.perf_counter()
    with progress_bar(f"{name}: testing") as update:
        result = evaluate(
            loaded.model,
            loaded.tokenizer,
            data.task,
            tested,
            demonstrations=demonstrations,
            progress=lambda done, total: update(done, total, ""),
        )
    assert isinstance(result.metrics, Metrics)
    return {
        "method": name,
        "accuracy": result.metrics.accuracy,
        "macro_f1": result.metrics.macro_f1,
        "fit_seconds": round(adaptation.training.seconds, 2) if adaptation else 0.0,
        "test_seconds": round(time.perf_counter() - started, 2),
        "trainable_parameters": adaptation.predictor.trainable_parameters if adaptation else 0,
        "right": [label == example.label for label, example in zip(result.predictions, tested, strict=True)],
    }


def _gain(rows: list[Json]) -> str:
    """What the last row gained over zero-shot and over norm tuning, and its significance, in one sentence."""
    zero_shot, _, plain, own = (row["right"] for row in rows)
    better, worse = (sum(a > b for a, b in zip(*pair, strict=True)) for pair in ((own, plain), (plain, own)))
    points = [100 * (sum(own) - sum(other)) / len(own) for other in (zero_shot, plain)]
    return (
        f"ofa fit gained {points[0]:+.0f} points over zero-shot and {points[1]:+.0f} over norm tuning: {better} texts "
        f"are right only with ofa fit and {worse} only with norm tuning (McNemar's test: "
        f"p = {_chance(better, worse):.2f})"
    )


def _chance(better: int, worse: int) -> float:
    """The exact two-sided p-value of McNemar's test."""
    count = better + worse
    tail = sum(comb(count, k) for k in range(min(better, worse) + 1)) / 2**count
    return min(1.0, 2 * tail)


def _show(rows: list[Json]) -> None:
    columns = ("method", "accuracy", "macro-F1", "seconds to fit", "seconds to test", "trainable parameters")
    formats = {"accuracy": ".3f", "macro_f1": ".3f", "fit_seconds": ".1f", "test_seconds": ".1f"}
    formats["trainable_parameters"] = ","
    cells = [(row["method"], *(format(row[name], spec) for name, spec in formats.items())) for row in rows]
    show_table(columns, cells, left=1)
