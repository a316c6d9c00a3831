"""Norm scales tuned by cross-entropy (norm tuning), plus λ₁ step ratio + λ₂ sharpness (OFA, arXiv 2505.19107)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ofa.evaluation.scorer import Scorer
from ofa.methods import Predictor
from ofa.models.introspection import trainable
from ofa.models.load import is_encoder
from ofa.models.types import CausalLM, Tokenizer
from ofa.regularizers.options import PAPER
from ofa.tasks.task import Example, Task
from ofa.training.config import TrainingConfig
from ofa.training.loop import train
from ofa.training.records import StepRecord
from ofa.tuning.heads import tune_head
from ofa.tuning.norms import restore_norms, tune_norms

OF_THE_PAPER = {"epochs": 60, "relative": False}
"""Its training, beside its objective `PAPER`."""


def fit_norm_scales(
    model: CausalLM,
    tokenizer: Tokenizer,
    task: Task,
    shots: Sequence[Example],
    config: TrainingConfig,
    *,
    validation: Sequence[Example] = (),
    **options: Any,
) -> Predictor:
    """Tune every norm scale on the shots, and an encoder's head; `options` are those of `training.loop.train`.

    With `validation` examples, the scales of the epoch with the best accuracy on them are kept. A failed or interrupted
    run restores the model.

    Raises:
        InputError: see `training.loop.train`.
    """
    try:
        if is_encoder(model.config):
            tune_norms(model)
            tune_head(model, task.labels)
            options = {**options, "tune": trainable}
        scorer = Scorer(model, tokenizer, task)
        validate = (lambda: scorer.accuracy(validation)) if validation else None
        result = train(model, scorer.encoder, shots, config, validate=validate, **options)
    except BaseException:
        restore_norms(model)
        raise
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Predictor(
        scorer,
        lambda: restore_norms(model),
        trainable_parameters=sum(parameter.numel() for parameter in tuned),
        training=result,
        stored_bytes=sum(parameter.nbytes for parameter in tuned),
    )


def fit_ofa(
    model: CausalLM,
    tokenizer: Tokenizer,
    task: Task,
    shots: Sequence[Example],
    seed: int,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    validation: Sequence[Example] = (),
    progress: Callable[[StepRecord, int], None] | None = None,
    **settings: Any,
) -> Predictor:
    """Tune every norm scale on the shots; `settings` are fields of `TrainingConfig`.

    With `validation` examples, the scales of the epoch with the best accuracy on them are kept. A failed or interrupted
    run restores the model.

    Raises:
        InputError: a setting is wrong, see `TrainingConfig` and `training.loop.train`.
    """
    return fit_norm_scales(
        model,
        tokenizer,
        task,
        shots,
        TrainingConfig(seed=seed, **settings),
        folder=folder,
        resume=resume,
        validation=validation,
        progress=progress,
    )


def fit_ofa_paper(
    model: CausalLM, tokenizer: Tokenizer, task: Task, shots: Sequence[Example], seed: int, **options: Any
) -> Predictor:
    """Tune every norm scale as arXiv 2505.19107 does: its objective, 60 epochs; options replace single settings."""
    return fit_ofa(model, tokenizer, task, shots, seed, **{**PAPER, **OF_THE_PAPER, **options})
