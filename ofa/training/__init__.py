"""The training loop: settings, steps, records, checkpoint, loss, figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ofa._lazy import on_first_use

if TYPE_CHECKING:
    from ofa.training.config import TrainingConfig as TrainingConfig
    from ofa.training.loop import Diverged as Diverged
    from ofa.training.loop import Guidance as Guidance
    from ofa.training.loop import Interrupted as Interrupted
    from ofa.training.loop import learning_rate as learning_rate
    from ofa.training.loop import seed_everything as seed_everything
    from ofa.training.loop import train as train
    from ofa.training.records import StepRecord as StepRecord
    from ofa.training.records import TrainingResult as TrainingResult
    from ofa.training.records import read_metrics as read_metrics

__all__, __getattr__, __dir__ = on_first_use(
    __name__,
    {
        "ofa.training.config": "TrainingConfig",
        "ofa.training.loop": "Diverged Guidance Interrupted learning_rate seed_everything train",
        "ofa.training.records": "StepRecord TrainingResult read_metrics",
    },
)
