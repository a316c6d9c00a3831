"""`ofa probe`: measure a model and its adapters layer by layer: accuracy, loss, step lengths, sharpness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ofa.commands.console import notice, progress_bar, show_json, show_table, tell_truncated
from ofa.commands.options import (
    DATA_FILES,
    BatchOption,
    ChatOptions,
    DataOptions,
    JsonOption,
    ModelOptions,
    Only,
    OverwriteOption,
    ShotsOption,
    ThreadsOption,
    command,
    set_threads,
)
from ofa.errors import InputError
from ofa.files import Json
from ofa.regularizers.options import RegularizerOptions

if TYPE_CHECKING:
    from ofa.adapters.read import Adapter
    from ofa.models.load import LoadedModel
    from ofa.probing.results import Probe
    from ofa.tasks import Example, Task

BASE = "base model"
"""Name of the model without an adapter, in the figure and the data."""


@command
def probe(
    data: Annotated[
        str, typer.Option(help=f"Labelled examples: {DATA_FILES}, a folder with task.json, or a task's name.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for probe.png and probe.json.")],
    how: DataOptions,
    turns: ChatOptions,
    source: ModelOptions,
    measured: Annotated[RegularizerOptions, Only(("estimator", "samples", "convention", "tokens"))],
    adapters: Annotated[
        list[Path] | None, typer.Argument(help="Adapter folders to compare with their base; without any, the base.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Probe with a class-balanced subset of this many.")] = None,
    seed: Annotated[
        int, typer.Option(help="Draws the subsets and the demonstrations, and fixes the random probes.")
    ] = 42,
    linear_probe: Annotated[
        str | None,
        typer.Option(help="Training examples: also train a linear classifier on every layer's hidden states."),
    ] = None,
    linear_size: Annotated[
        int, typer.Option(min=1, help="Train the linear probe on a class-balanced subset of at most this many.")
    ] = 500,
    demonstrations: Annotated[
        str | None, typer.Option(help="Training examples to draw demonstrations from, the same for every model.")
    ] = None,
    shots: ShotsOption = 5,
    threads: ThreadsOption = None,
    batch_size: BatchOption = 16,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Draw accuracy, loss, step ratio and sharpness over the decoder layers, a line for each adapter and its base.

    Example: ofa probe adapter-ofa adapter-norm-tuning --data test.jsonl --out probed

    The accuracy is that of the logit lens: every layer's hidden state, read by the model's own final norm and head.
    """
    from ofa.commands.adapted import asked_chat, asked_task, check_chat, open_model, with_base
    from ofa.commands.data import data_origin, demonstration_pool
    from ofa.files import claimed_folder
    from ofa.tasks import examples_from, few_shot

    folders = adapters or []
    check_chat(turns, folders)
    names = _names(folders)
    source = with_base(source, folders[0] if folders else None)
    separator, offline = how.separator, source.offline
    with claimed_folder(out, overwrite=overwrite) as folder:
        task = asked_task(folders, data, how, offline=source.offline)
        examples = _at_most(size, examples_from(data, task, separator=separator, offline=offline), task, seed)
        pool, shown = (
            demonstration_pool(name, task, separator=separator, offline=offline) if name else ()
            for name in (linear_probe, demonstrations)
        )
        asked: Json = measured.model_dump(exclude_unset=True) | {"seed": seed, "batch_size": batch_size}
        asked["training"] = _at_most(linear_size, pool, task, seed)
        asked["demonstrations"] = few_shot(shown, task.labels, shots, seed).examples if shown else ()
        from ofa.adapters.read import read_adapter

        read = [read_adapter(one) for one in folders]
        set_threads(threads)
        subject = open_model(source)
        task = asked_chat(task, turns, subject.tokenizer, folders, ["--demonstrations"] if shown else ())
        probes = _probe_all(subject, task, dict(zip(names, read, strict=True)), examples, asked)
        document = {
            "model": subject.model.name_or_path,
            "data": data,
            "task": task.to_dict(),
            "texts": len(examples),
            **{name: len(value) if isinstance(value, tuple) else value for name, value in asked.items()},
            "dtype": source.dtype,
            **_told(probes, dict(zip(names, folders, strict=True))),
        }
        title = f"{data_origin(data)['name']}: {len(examples)} texts"
        _write(folder, f"{title}, {Path(document['model']).name}", probes, document)
    tell_truncated(max(one.truncated for one in probes.values()))
    if as_json:
        show_json(document)
    else:
        _show(document, title)
        notice(f"figure and data: {folder / 'probe.png'}, probe.json")


def _names(folders: list[Path]) -> list[str]:
    """The names of the adapters' folders, or their full paths if two names are equal.

    Raises:
        InputError: a folder is given twice.
    """
    places = [folder.resolve() for folder in folders]
    twice = next((folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise InputError(f"the adapter {twice} is given twice; name it once")
    short = [BASE, *(place.name for place in places)]
    return [str(place) if short.count(place.name) > 1 else place.name for place in places]


def _at_most(size: int | None, examples: tuple[Example, ...], task: Task, seed: int) -> tuple[Example, ...]:
    """The examples, or a class-balanced subset of this many."""
    from ofa.tasks import class_balanced

    return class_balanced(examples, task.labels, size, seed) if size is not None and examples else examples


def _probe_all(
    subject: LoadedModel,
    task: Task,
    adapters: dict[str, Adapter],
    examples: tuple[Example, ...],
    asked: Json,
) -> dict[str, Probe]:
    """Probe the base and then every adapter; all adapters are checked against the base first."""
    from ofa.adapters.save_and_load import load_adapter
    from ofa.probing.layerwise import probe as measure
    from ofa.tuning.norms import restore_norms

    model = subject.model
    for adapter in adapters.values():
        load_adapter(model, adapter)
        restore_norms(model)
    probes: dict[str, Probe] = {}
    with progress_bar("probing") as update:
        for index, (name, adapter_or_none) in enumerate([(BASE, None), *adapters.items()]):

            def report(done: int, total: int, index: int = index, name: str = name) -> None:
                update(index * total + done, (1 + len(adapters)) * total, name)

            if adapter_or_none is not None:
                load_adapter(model, adapter_or_none)
            probes[name] = measure(model, subject.tokenizer, task, examples, progress=report, **asked)
            restore_norms(model)
    return probes


def _told(probes: dict[str, Probe], folders: dict[str, Path]) -> dict[str, object]:
    """The results as JSON values."""
    from ofa.adapters.write import versions

    first = next(iter(probes.values()))
    return {
        "scored": first.mode,
        "truncated": first.truncated,
        "estimators": {granularity: steps.estimator for granularity, steps in first.steps.items()},
        "versions": versions(),
        "models": [_model(name, one, folders.get(name)) for name, one in probes.items()],
    }


def _model(name: str, probe: Probe, folder: Path | None) -> dict[str, object]:
    steps = next(iter(probe.steps.values()))
    curves: dict[str, dict[str, dict[str, list[object]]]] = {}
    for value in probe.values():
        curve = curves.setdefault(value.granularity, {}).setdefault(value.metric, {})
        for key in ("step", "layer", "branch", "value", "standard_error"):
            curve.setdefault(key, []).append(getattr(value, key))
    return {
        "name": name,
        "adapter": None if folder is None else str(folder),
        "accuracy": float(probe.lens.accuracy[-1]),
        "loss": float(probe.lens.loss[-1]),
        "step_ratio": steps.step_ratio,
        "sharpness": steps.sharpness,
        "seconds": round(probe.seconds, 2),
        "curves": curves,
    }


def _write(folder: Path, title: str, probes: dict[str, Probe], document: dict[str, object]) -> None:
    from ofa.files import json_writer, write_together
    from ofa.probing.figures import probe_figure

    figure = probe_figure(probes, title)
    write_together(
        {
            folder / "probe.json": json_writer(document),
            folder / "probe.png": lambda path: figure.savefig(path, format="png", dpi=150),
        }
    )


def _show(document: Json, title: str) -> None:
    names = ("accuracy", "loss", "step_ratio", "sharpness")
    rows = [(one["name"], *(f"{one[name]:.4g}" for name in names)) for one in document["models"]]
    columns = ("model", "accuracy", "loss", "step ratio J", "sharpness H")
    show_table(columns, rows, title=f"{title}; J and H by {next(iter(document['estimators']))}", left=1)
