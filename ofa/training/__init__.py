"""The training loop: settings, steps, records, checkpoint, loss, figure."""

from ofa.training.config import TrainingConfig
from ofa.training.records import StepRecord, TrainingResult

__all__ = ["StepRecord", "TrainingConfig", "TrainingResult"]
