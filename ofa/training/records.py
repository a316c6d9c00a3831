"""The records of a training run, one per optimizer step, and its result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ofa.adapters.folder import METRICS
from ofa.files import write_text
from ofa.training.config import TrainingConfig


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, a line of the metrics file.

    `loss` is the cross-entropy in nats, `step_ratio` and `sharpness` are J and H without their weights (None where the
    term has weight 0), `drift` is ‖θ − θ₀‖/‖θ₀‖ of the tuned parameters, `seconds` the time since the run began.

    Example:
        >>> rows = [("a joy", "good"), ("warm and funny", "good"), ("far too long", "bad"), ("a bore", "bad")]
        >>> adaptation = ofa.adapt(model, tokenizer, rows, template="{text}:", shots=2, max_steps=2)
        >>> record = adaptation.training.records[-1]
        >>> record.loss > 0, record.sharpness, record.drift > 0
        (True, None, True)
    """

    step: int
    epoch: int
    loss: float
    step_ratio: float | None
    sharpness: float | None
    penalty: float
    learning_rate: float
    gradient_norm: float
    drift: float
    seconds: float


@dataclass(frozen=True)
class TrainingResult:
    """The records of all steps, the run's time in seconds, truncated prompts, settings, and the best epoch if it
    validated.

    Example:
        >>> rows = [("a joy", "good"), ("warm and funny", "good"), ("far too long", "bad"), ("a bore", "bad")]
        >>> adaptation = ofa.adapt(model, tokenizer, rows, template="{text}:", shots=2, max_steps=2)
        >>> [record.step for record in adaptation.training.records]
        [1, 2]
    """

    records: tuple[StepRecord, ...]
    seconds: float
    truncated: int
    config: TrainingConfig
    best_epoch: int | None = None


def write_metrics(folder: Path, records: Sequence[StepRecord]) -> None:
    """Replace a run's metrics file."""
    write_text(folder / METRICS, "".join(json.dumps(asdict(record)) + "\n" for record in records))


def read_metrics(folder: Path) -> list[StepRecord]:
    """The records of a run's metrics file, up to a line that a kill cut short."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = []
    for line in lines:
        try:
            records.append(StepRecord(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return records
