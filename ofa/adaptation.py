"""`adapt`: tune a model on a few examples per class; the result predicts and can be saved."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from ofa.adapters.peft_folder import check_norm_names, save_peft_adapter
from ofa.adapters.save_and_load import save_adapter
from ofa.errors import InputError
from ofa.evaluation.chat import asked_chat
from ofa.evaluation.scorer import Evaluation
from ofa.files import Json, claim_folder
from ofa.methods import GUIDED, NORM_METHODS, WITH_NORMS, Predictor, adapter_method, default_method
from ofa.methods.calibrating import (
    calibration,
    check_kind,
    default_kind,
    held_out_by_folds,
    held_out_by_validation,
    holds_out,
)
from ofa.models.types import CausalLM, Tokenizer
from ofa.tasks import Data, Example, FewShot, Shots, TaskData, examples_from, few_shot, load_task
from ofa.training.records import StepRecord, TrainingResult, write_metrics


@dataclass(frozen=True)
class Adaptation:
    """A model adapted to a task, with the data, settings and records of the run.

    Example:
        >>> rows = [("a joy", "good"), ("warm and funny", "good"), ("far too long", "bad"), ("a bore", "bad")]
        >>> adaptation = ofa.adapt(model, tokenizer, rows, template="{text}:", shots=2, max_steps=2)
        >>> len(adaptation.predict(["a warm film", "it drags"])), adaptation.predict_proba(["a joy"]).shape
        (2, torch.Size([1, 2]))
        >>> adaptation.evaluate(rows).metrics.count
        4
        >>> adaptation.details()["shots"], len(adaptation.training.records)
        (2, 2)
        >>> adaptation.save(folder / "adapter").name
        'adapter'
        >>> adaptation.close()
    """

    predictor: Predictor
    data: TaskData
    drawn: FewShot
    shots: Shots
    seed: int
    method: str

    @property
    def training(self) -> TrainingResult:
        """The records of the training run."""
        assert self.predictor.training is not None
        return self.predictor.training

    def predict(self, texts: Sequence[str | Mapping[str, object]]) -> list[str]:
        """The most probable label of each text, or of each mapping of columns if the template has several.

        Raises:
            InputError: a text is empty, a row lacks a column, or the adaptation is closed.
        """
        return self._open().predict(self._texts(texts))

    def predict_proba(self, texts: Sequence[str | Mapping[str, object]]) -> Tensor:
        """Probability of each label in the task's order, (texts, labels), float32; rows as for `predict`."""
        return self._open().predict_proba(self._texts(texts))

    def evaluate(self, data: TaskData | Data) -> Evaluation:
        """Predict labelled examples of any kind that `load_task` takes, and measure the predictions."""
        return self._open().evaluate(examples_from(data, self.data.task))

    def save(self, folder: str | Path, *, overwrite: bool = False, **details: Any) -> Path:
        """Write the adapter folder (see `save_adapter`); `details` are added to its `ofa_config.json`.

        Raises:
            InputError: the folder cannot be written, or is not empty and `overwrite` is off; the adaptation is closed.
        """
        self._open()
        write = save_adapter if self.method in NORM_METHODS else save_peft_adapter
        return write(self.predictor.scorer.model, folder, details={**self.details(), **details}, overwrite=overwrite)

    def details(self) -> Json:
        """Entries for `ofa_config.json`: task, shots and their indices, seed, settings, seconds; no training text."""
        config, calibrated = self.training.config, self.predictor.scorer.calibration
        return {
            "method": self.method,
            "task": self.data.task.to_dict(),
            "shots": self.shots,
            "examples": len(self.data.train),
            "indices": list(self.drawn.indices),
            "shots_sha256": self.drawn.sha256,
            "seed": self.seed,
            "settings": config.model_dump(exclude={"seed"}),
            **({"calibration": calibrated.to_dict()} if calibrated else {}),
            "seconds": round(self.training.seconds, 2),
            "threads": torch.get_num_threads(),
        }

    def _texts(self, rows: Sequence[str | Mapping[str, object]]) -> list[str]:
        if isinstance(rows, str | Mapping):
            raise InputError("the texts are a single one: put it into a list")
        return [self.data.task.text_of(row, f"text {number}") for number, row in enumerate(rows, start=1)]

    def _open(self) -> Predictor:
        if not any(held() is self for held in _adapted.values()):
            raise InputError(
                "the adaptation is closed, and the model has its own weights again: predict and save first"
            )
        return self.predictor

    def close(self) -> None:
        """Restore the model's own scales."""
        self.predictor.close()


def adapt(
    model: CausalLM,
    tokenizer: Tokenizer,
    task: TaskData | Data,
    shots: Shots = 5,
    seed: int = 42,
    *,
    method: str | None = None,
    template: str | None = None,
    labels: Sequence[str] = (),
    text_column: str = "",
    label_column: str = "",
    folder: str | Path | None = None,
    resume: bool = False,
    validation: TaskData | Data = (),
    calibrate: str | None = None,
    chat: bool | None = None,
    system: str | None = None,
    progress: Callable[[StepRecord, int], None] | None = None,
    **settings: Any,
) -> Adaptation:
    """Adapt a Hugging Face model to a task from a few examples per class: by OFA, or by another method.

    Args:
        task: task and examples, or anything that `load_task` takes: the name of a known task, a folder with task.json,
            a file, a DataFrame, a data set, a list of (text, label) or of mappings.
        method: one of `methods.ADAPTER_METHODS`; without it norm tuning, with the terms of OFA that `settings` weigh.
        template, labels, text_column, label_column: for data without a task.json, see `load_task`.
        shots: examples per class, drawn from the task's training examples by `seed`, or "all".
        folder: for metrics and checkpoints during training; None writes nothing to disk. The guided methods write only
            metrics, at the end.
        resume: continue from the folder's checkpoint.
        validation: examples to choose the best epoch by; without them the last epoch is kept.
        calibrate: "fixed" divides the log-probabilities by 1.5, the default of relative steps. "temperature" chooses
            the divisor on `validation`, or without it on every shot by a model that was trained without the shot's
            fold, for which up to five more models are trained. "context" makes probabilities relative to those of texts
            without content, "both" does both, and "none" nothing. docs/choosing.md says what is known of each.
        chat: put the prompt into the user's turn of the model's chat template; None is the default of `ofa fit`.
        system: the system prompt of a chat; without it the chat template's own.
        settings: fields of `training.config.TrainingConfig`, such as `epochs`, `step_ratio` or `sharpness`, and the
            method's own, such as `rank` of LoRA; those left out have the method's defaults.

    Returns:
        The adaptation, which predicts, saves the scales and restores the model.

    Raises:
        InputError: the task, the method, the number of shots, a setting or the model's chat template cannot be used; or
            an earlier adaptation of the model is not closed.

    Example:
        >>> rows = [("a joy", "good"), ("warm and funny", "good"), ("far too long", "bad"), ("a bore", "bad")]
        >>> template = "Review: {text}\\nSentiment:"
        >>> adaptation = ofa.adapt(model, tokenizer, rows, template=template, shots=2, max_steps=2)
        >>> adaptation.predict_proba(["a warm film"]).shape
        torch.Size([1, 2])
        >>> adaptation.close()
    """
    if model in _adapted:
        raise InputError(
            "this model holds an earlier adaptation, from which training would go on: close() that first, or load the "
            "model again"
        )
    method = method or default_method(settings)
    fit = adapter_method(method)
    if "with_norms" in settings:
        raise InputError(
            f"norm scales beside another adapter are the methods {' and '.join(WITH_NORMS)}; choose one of them, and "
            "leave with_norms out"
        )
    if method in WITH_NORMS:
        check_norm_names(model)
    if method in GUIDED and resume:
        raise InputError(f"a run of {method} keeps no checkpoint and cannot be resumed; train it again")
    data = load_task(task, template=template, labels=labels, text_column=text_column, label_column=label_column)
    if not data.train:
        raise InputError(f'the task "{data.task.name}" has no training examples; add a train file')
    shown = ["demonstrated_steps"] if settings.get("demonstrated_steps") else []
    data = replace(data, task=asked_chat(data.task, tokenizer, chat, system, demonstrations=shown))
    drawn = few_shot(data.train, data.task.labels, shots, seed)
    kept = {} if method in GUIDED else {"folder": folder, "resume": resume}
    metrics = claim_folder(folder, overwrite=True) if folder is not None and method in GUIDED else None
    chosen_by = examples_from(validation, data.task)
    held_out = None
    if calibrate is not None:
        check_kind(calibrate, data.task)
    if calibrate is not None and holds_out(calibrate) and not chosen_by:

        def fit_fold(shots: Sequence[Example]) -> Predictor:
            return fit(model, tokenizer, data.task, shots, seed, **settings)

        held_out = held_out_by_folds(fit_fold, data.task, drawn.examples)
    predictor = fit(
        model,
        tokenizer,
        data.task,
        drawn.examples,
        seed,
        validation=chosen_by,
        progress=progress,
        **kept,
        **settings,
    )
    assert predictor.training is not None
    kind = calibrate or default_kind(predictor.scorer, predictor.training.config)
    if holds_out(kind) and chosen_by:
        held_out = held_out_by_validation(predictor.scorer, chosen_by)
    predictor.scorer.calibration = calibration(predictor.scorer, kind, held_out)
    predictor = replace(predictor, release=functools.partial(_release, model, predictor.close))
    adaptation = Adaptation(predictor, data, drawn, shots, seed, method)
    _adapted[model] = ref(adaptation)
    if metrics is not None:
        write_metrics(metrics, adaptation.training.records)
    return adaptation


_adapted: WeakKeyDictionary[CausalLM, ref[Adaptation]] = WeakKeyDictionary()
"""Models with an adaptation that is not closed."""


def _release(model: CausalLM, restore: Callable[[], None]) -> None:
    restore()
    _adapted.pop(model, None)
