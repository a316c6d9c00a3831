"""OFA: norm scales tuned by cross-entropy + λ₁ step ratio + λ₂ sharpness (arXiv 2505.19107)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ofa.methods import Predictor
from ofa.methods.norm_scales import fit_norm_scales
from ofa.tasks.task import Example, Task
from ofa.trainer import StepRecord, checked_config


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
    return fit_norm_scales(
        model,
        tokenizer,
        task,
        shots,
        checked_config(seed=seed, **settings),
        folder=folder,
        resume=resume,
        validation=validation,
        progress=progress,
    )
