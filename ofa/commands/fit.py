"""`ofa fit`: adapt a model to a few examples, by default by its norm scales, and write the adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ofa.commands.console import losses_told, notice, progress_bar, show, show_json, tell_truncated
from ofa.commands.options import (
    DATA_FILES,
    ChatOptions,
    DataOptions,
    JsonOption,
    ModelOptions,
    OverwriteOption,
    ShotsOption,
    ThreadsOption,
    command,
    set_threads,
)
from ofa.errors import InputError
from ofa.files import Json
from ofa.methods import ADAPTER_METHODS, NORM_METHODS, default_method
from ofa.training.config import TrainingConfig

if TYPE_CHECKING:
    from ofa.adaptation import Adaptation
    from ofa.tasks import Example


_UNUSED_TESTED = 200
"""Maximum number of unused examples to score an adapter on without --test; a standard error of about 3 points."""


@command
def fit(
    data: Annotated[
        str,
        typer.Option(
            help=f"Training examples: {DATA_FILES}; prompt and completion without a template; a folder with task.json, "
            "a demo task (reviews, tickets, questions), a task of the paper (sst2, trec, …), or a hub id."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the adapter, its metrics and its figure.")],
    how: DataOptions,
    turns: ChatOptions,
    source: ModelOptions,
    training: TrainingConfig,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"How to adapt: {', '.join(ADAPTER_METHODS)}. Without it norm-tuning, with OFA's terms if "
            "--step-ratio or --sharpness is given. `ofa compare` measures which is best."
        ),
    ] = None,
    own: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A setting that only the method has, such as rank=16 of lora."
        ),
    ] = None,
    shots: ShotsOption = 5,
    threads: ThreadsOption = None,
    validation: Annotated[
        str | None, typer.Option(help="Examples to choose the best epoch by; without them the last epoch is kept.")
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(
            help="Examples to score the finished adapter on, kept in ofa_config.json. Without it up to "
            f"{_UNUSED_TESTED} of the training examples that were not used."
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="fixed|temperature|context|both|none",
            help="Calibrate the probabilities. fixed divides the log-probabilities by 1.5; it is the default of norm "
            "scales with relative steps. temperature chooses the divisor on --validation, or else by training up to "
            "five more models. context divides by the probabilities of texts without content; measured, it cost a "
            "trained model 6 points of accuracy.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that was stopped in the folder.")] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Adapt a model to a few labelled examples, and write a PEFT adapter: norm scales (under a megabyte), LoRA or IA3.

    Example: ofa fit --data train.jsonl --template "Sentence: {text}\\nLabel:" --labels objective,subjective
    --shots 5 --seed 42 --out adapter

    An encoder such as BERT is tuned with a classification head. It reads the text without the rest of the template.

    Ctrl-C stops after the current step, and the same command with --resume continues to the same result.
    The guided methods cannot be resumed.
    """
    from ofa.commands.adapted import asked_chat, open_model, with_base
    from ofa.commands.data import data_origin, training_data
    from ofa.files import claimed_folder
    from ofa.tasks import class_balanced, examples_from, few_shot, unused
    from ofa.tasks.duplicates import warn_of_shared_texts

    _refuse_stopped(out, resume or overwrite)
    method = method or default_method(training.model_dump())
    source, seed = with_base(source, None), training.seed
    given = training_data(data, how, offline=source.offline)
    held_out, tested = (
        examples_from(part, given.task, separator=how.separator, offline=source.offline) if part else ()
        for part in (validation, test)
    )
    drawn = few_shot(given.train, given.task.labels, shots, seed)
    for name, part in ((validation, held_out), (test, tested)):
        warn_of_shared_texts(drawn.examples, part, name)
    left = unused(given.train, drawn)
    if left and not test:
        tested = class_balanced(left, given.task.labels, _UNUSED_TESTED, seed)
    with claimed_folder(out, overwrite=overwrite or resume) as folder:
        settings = _settings(method, training, own or [])  # only here: methods import torch, which takes seconds
        from ofa.adaptation import adapt
        from ofa.adapters.folder import CHECKPOINT
        from ofa.training.checkpoint import recorded_threads

        # A resumed run is bit-identical only with the same number of threads.
        set_threads(threads or (recorded_threads(folder / CHECKPOINT) if resume else None))
        loaded = open_model(source)
        shown = ["--demonstrated-steps"] if training.demonstrated_steps else []
        given = replace(given, task=asked_chat(given.task, turns, loaded.tokenizer, demonstrations=shown))
        with progress_bar("training") as update:
            adaptation = adapt(
                loaded.model,
                loaded.tokenizer,
                given,
                shots,
                seed,
                method=method,
                chat=None if given.task.chat else False,  # decided and told above
                folder=folder,
                resume=resume,
                validation=held_out,
                calibrate=calibrate,
                progress=losses_told(update),
                **settings,
            )
        tell_truncated(adaptation.training.truncated, "training texts")
        origins = {part: data_origin(name) for part, name in (("train", data), ("test", test)) if name}
        scores = _scores(adaptation, tested)
        if tested and not test:
            scores["unused"] = len(left)
        summary = _save(adaptation, folder, scores, data=origins)
    if as_json:
        show_json(summary)
    else:
        _tell(summary, several=len(given.task.columns.names) > 1)


def _settings(method: str, training: TrainingConfig, own: list[str]) -> Json:
    """The settings that were asked for, by options and by `--set`.

    Raises:
        InputError: the method cannot be saved, or has no such setting.
    """
    import yaml

    from ofa.comparison.arguments import check_settings
    from ofa.methods import adapter_method

    adapter_method(method)
    settings = training.model_dump(exclude={"seed"}, exclude_unset=True)
    for pair in own:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair} has no value; write it as in --set rank=16")
        if name in TrainingConfig.model_fields:
            raise InputError(f"--set {pair} has an option of its own; write --{name.replace('_', '-')} {value}")
        settings[name] = yaml.safe_load(value)
    check_settings(method, settings)
    return settings


def _refuse_stopped(folder: Path, decided: bool) -> None:
    """Refuse the folder of a stopped run with a specific message, before the check for an empty folder."""
    from ofa.adapters.folder import CHECKPOINT

    if not decided and (folder / CHECKPOINT).is_file():
        raise InputError(
            f"{folder} holds a run that was stopped ({CHECKPOINT}); pass --resume to continue it, --overwrite to start "
            "again, or choose another folder"
        )


def _scores(adaptation: Adaptation, tested: tuple[Example, ...]) -> dict[str, object]:
    if not tested:
        return {}
    with progress_bar("testing") as update:
        measured = adaptation.predictor.evaluate(tested, progress=lambda done, total: update(done, total, ""))
    tell_truncated(measured.truncated, "test texts")
    return {**measured.metrics.to_dict(), "count": len(tested)}


def _save(adaptation: Adaptation, folder: Path, scores: dict[str, object], **details: object) -> dict[str, object]:
    from ofa.adapters.folder import CHECKPOINT, WEIGHTS
    from ofa.training.figure import training_figure

    adaptation.save(folder, overwrite=True, scores=scores, **details)
    training_figure({"training": adaptation.training.records}, folder / "training.png")
    # A saved adapter makes the checkpoint obsolete.
    (folder / CHECKPOINT).unlink(missing_ok=True)
    records = adaptation.training.records
    return {
        "folder": str(folder),
        "adapter_bytes": (folder / WEIGHTS).stat().st_size,
        "method": adaptation.details()["method"],
        "scored": adaptation.predictor.scorer.mode,
        "trainable_parameters": adaptation.predictor.trainable_parameters,
        "steps": len(records),
        "first_loss": records[0].loss,
        "last_loss": records[-1].loss,
        "drift": records[-1].drift,
        "seconds": round(adaptation.training.seconds, 2),
        "truncated": adaptation.training.truncated,
        "best_epoch": adaptation.training.best_epoch,
        "used": len(adaptation.drawn.indices),
        "examples": len(adaptation.data.train),
        "calibration": adaptation.details().get("calibration"),
        "scores": scores,
    }


def _tell(summary: Json, *, several: bool) -> None:
    tuned = "norm scales tuned" if summary["method"] in NORM_METHODS else f"parameters of {summary['method']} trained"
    if summary["scored"] == "head":
        tuned += " with the head's weights"
    notice(
        f"{summary['used']:,} of {summary['examples']:,} examples used; "
        f"{summary['trainable_parameters']:,} {tuned} in {summary['steps']} steps, "
        f"{summary['seconds']:.0f} s; loss {summary['first_loss']:.3f} → {summary['last_loss']:.3f}"
    )
    calibrated = summary["calibration"] or {}
    if calibrated.get("held_out") or calibrated.get("prior"):  # not the fixed temperature, which is the same every time
        found = calibrated["temperature"]
        notice(f"calibrated, with a temperature of {found:.2f}; `ofa evaluate` shows before and after")
    accuracy = summary["scores"].get("accuracy", summary["scores"].get("exact_match"))
    if accuracy is not None:
        count, left = summary["scores"]["count"], summary["scores"].get("unused")
        which = "all" if count == left else f"{count:,}"
        where = "the test examples" if left is None else f"{which} of the {left:,} examples that were not used"
        show(f"accuracy {accuracy:.3f} on {where}")
    notice(f"adapter: {summary['folder']} ({summary['adapter_bytes'] / 1000:.0f} kB)")
    how = "--data FILE --out LABELLED.csv" if several else '--text "…"'
    notice(f"try: ofa predict {summary['folder']} {how}")
