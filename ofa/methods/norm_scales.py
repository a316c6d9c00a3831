"""What the methods that tune norm scales share: train them, score with them, put the model's own back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ofa.encoding import Encoder, model_window
from ofa.evaluation import Scorer
from ofa.methods import Predictor
from ofa.tasks.task import Example, Task
from ofa.trainer import TrainingConfig, train
from ofa.tuning import restore_norms


def fit_norm_scales(
    model: Any,
    tokenizer: Any,
    task: Task,
    shots: Sequence[Example],
    config: TrainingConfig,
    *,
    validation: Sequence[Example] = (),
    **options: Any,
) -> Predictor:
    """Tune every norm scale on the shots; `options` are those of `trainer.train`.

    With `validation` examples the scales of the epoch with the best accuracy on them are kept.
    A run that fails or is interrupted leaves the model as it was.

    Raises:
        InputError: see `trainer.train`.
    """
    scorer = Scorer(model, tokenizer, task)
    validate = (lambda: scorer.accuracy(validation)) if validation else None
    try:
        encoder = Encoder(tokenizer, task, model_window(model))
        result = train(model, encoder, shots, config, validate=validate, **options)
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
