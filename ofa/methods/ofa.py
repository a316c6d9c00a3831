"""OFA: norm scales tuned by cross-entropy + λ₁ step ratio + λ₂ sharpness (arXiv 2505.19107)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ofa.encoding import Encoder, model_window
from ofa.evaluation import Scorer
from ofa.methods import Predictor
from ofa.tasks.task import Example, Task
from ofa.trainer import StepRecord, checked_config, train
from ofa.tuning import restore_norms


def fit(
    model: Any,
    tokenizer: Any,
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

    With `validation` examples the scales of the epoch with the best accuracy on them are kept.
    A run that fails or is interrupted leaves the model as it was.

    Raises:
        InputError: a setting is wrong, see `TrainingConfig` and `trainer.train`.
    """
    encoder = Encoder(tokenizer, task, model_window(model))
    scorer = Scorer(model, tokenizer, task)
    config = checked_config(seed=seed, **settings)

    try:
        result = train(
            model,
            encoder,
            shots,
            config,
            folder=folder,
            resume=resume,
            validate=(lambda: scorer.accuracy(validation)) if validation else None,
            progress=progress,
        )
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
