"""Run one cell: fit the method, test it in each of its contexts, restore the model, record the costs."""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ofa.comparison.environment import now, versions
from ofa.comparison.fingerprint import Fingerprint
from ofa.comparison.plan import Job
from ofa.comparison.records import Record, Score
from ofa.errors import in_words
from ofa.evaluation.scorer import Evaluation
from ofa.methods import Predictor, method
from ofa.models.load import LoadedModel
from ofa.tasks import Example


@dataclass(frozen=True)
class Outcome:
    """A cell's record; `intact` if the model is unchanged, so that another cell may follow."""

    record: Record
    intact: bool


class CellRunner:
    """Runs cells with one model, one after the other."""

    def __init__(self, loaded: LoadedModel, batch_size: int = 16) -> None:
        self._model, self._tokenizer, self._batch_size = loaded.model, loaded.tokenizer, batch_size
        self._before = Fingerprint.of(loaded.model)
        self.versions = versions(loaded.model) | {"weights": self._before.weights}

    def run(self, job: Job) -> Outcome:
        """Run the cell; an exception becomes the error of its record."""
        started = time.perf_counter()
        peak = _PeakMemory()
        with _warnings_collected() as warnings:
            record = self._attempt(job)
        left = self._left_behind()
        if left is not None:
            record = Record(job.cell, error=f"the method did not restore the model: {left}")
        if warnings:
            record = replace(record, notes={**record.notes, "warnings": list(dict.fromkeys(warnings))})
        record = replace(
            record,
            seconds=round(time.perf_counter() - started, 4),
            peak_memory_bytes=peak.bytes,
            shots_sha256=job.shots.sha256,
            finished=now(),
            versions=self.versions,
        )
        return Outcome(record, left is None)

    def _attempt(self, job: Job) -> Record:
        try:
            return self._measured(job)
        except Exception as error:
            if os.environ.get("OFA_DEBUG"):
                traceback.print_exc()
            return Record(job.cell, error=in_words(error))

    def _measured(self, job: Job) -> Record:
        cell, shots = job.cell, job.shots.examples
        started = time.perf_counter()
        fit = method(cell.method)
        with fit(self._model, self._tokenizer, job.task, shots, cell.seed, **cell.settings, **job.inputs) as predictor:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            fit_seconds = time.perf_counter() - started
            scores, truncated = {}, 0
            tested = [context for context in predictor.contexts if context in job.contexts] or predictor.contexts
            untested = [context for context in predictor.contexts if context not in tested]
            for context in tested:
                # None keeps the method's own demonstrations, if it has any.
                shown = shots if context == "demonstrations" else None
                result = predictor.evaluate(job.tested, demonstrations=shown, batch_size=self._batch_size)
                scores[context] = _score(job, result, _extra_tokens(predictor, job, shown or ()))
                truncated += result.truncated
            return Record(
                cell,
                scores=scores,
                fit_seconds=round(fit_seconds, 4),
                trainable_parameters=predictor.trainable_parameters,
                stored_bytes=predictor.stored_bytes,
                notes={
                    **predictor.notes,
                    **({"truncated_texts": truncated} if truncated else {}),
                    **({"untested": untested} if untested else {}),
                    **({"chat": True} if job.task.chat else {}),
                },
            )

    def _left_behind(self) -> str | None:
        try:
            return self._before.difference(Fingerprint.of(self._model))
        except Exception as error:  # after a failed assertion on a GPU, every call raises
            return in_words(error)


def _score(job: Job, result: Evaluation, extra_tokens: int) -> Score:
    place = {label: index for index, label in enumerate(job.task.labels)}
    return Score(
        metrics=result.metrics.to_dict(),
        predictions=tuple(place[label] for label in result.predictions),
        truth=tuple(place[example.label] for example in job.tested),
        seconds_per_text=result.seconds / len(job.tested),
        extra_tokens=extra_tokens,
    )


def _extra_tokens(predictor: Predictor, job: Job, demonstrations: tuple[Example, ...]) -> int:
    """Number of tokens in front of every prompt: demonstrations that fit the window, and the method's own."""
    own = int(predictor.notes.get("extra_tokens", 0))
    if not demonstrations:
        return own
    encoder = predictor.scorer.encoder
    taken = encoder.encode_demonstrations(demonstrations, texts=[example.text for example in job.tested])
    return own + len(taken) - len(encoder.leading)


class _PeakMemory:
    """Peak memory: on a GPU since this object was created, on a CPU since the process started."""

    def __init__(self) -> None:
        for device in _gpus():
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def bytes(self) -> int:
        if torch.cuda.is_available():
            return sum(torch.cuda.max_memory_allocated(device) for device in _gpus())
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _gpus() -> range:
    return range(torch.cuda.device_count())


@contextmanager
def _warnings_collected() -> Iterator[list[str]]:
    """Collect the package's warnings while a cell runs, for its record."""
    collected: list[str] = []
    logger, handler = logging.getLogger("ofa"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: collected.append(record.getMessage())  # type: ignore[method-assign]
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield collected
    finally:
        logger.handlers, logger.propagate = handlers, propagate
