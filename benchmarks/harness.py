"""Overhead of `ofa compare` besides the model's work, and the speed of testing a method.

python -m benchmarks.harness --out benchmarks/results/harness_cpu.csv

- `outside_model`: share of a cell's time in which the model runs neither forward nor backward and no optimizer steps:
  token ids, batches, scores, metrics, the check that the model is given back.
- `throughput`: texts per second of a test, relative to bare forward passes of the model over the same batches, with
  logits only at the last tokens, which is faster.

Times are medians of the repetitions; those of the throughput alternate, so that a slow minute affects both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.optim import optimizer

from benchmarks.table import commit, cpu, significant, writing
from ofa.comparison.cell import CellRunner
from ofa.comparison.grid import Grid, checked_part
from ofa.comparison.plan import Job, Plan, read_tasks
from ofa.comparison.records import Record
from ofa.evaluation.encoding import Encoder, batches_by_length, collate
from ofa.logs import quiet_libraries
from ofa.methods import method
from ofa.models.introspection import model_window
from ofa.models.load import load_model

METHODS = ("zero-shot", "icl", "norm-tuning", "ofa")
TESTED = ("zero-shot", "norm-tuning")
"""Methods whose test is compared with bare forward passes."""
BATCH = 16


@dataclass(frozen=True)
class Row:
    """One number; see the text above for the metrics."""

    benchmark: str
    method: str
    metric: str
    value: float
    texts: int
    device: str
    torch: str
    commit: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--model", default="embedded", help="hub id, folder, or embedded")
    parser.add_argument("--task", default="reviews", help="task to test on")
    parser.add_argument("--texts", type=int, default=100, help="test examples")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of the trained methods")
    parser.add_argument("--repetitions", type=int, default=3, help="cells and tests of each kind")
    options = parser.parse_args(arguments)
    quiet_libraries()
    plan = _plan(options)
    loaded = load_model(options.model)
    name = _device(loaded.model)
    origin = len(next(iter(plan.tasks.values())).tested), name, torch.__version__, commit()
    with writing(options.out, Row) as write:
        for measured in (outside_model(plan, loaded), throughput(plan, loaded, options.repetitions)):
            for label, metric, value in measured:
                print(f"{label} {metric} {value:.4f}", flush=True)
                write([Row(loaded.name, label, metric, significant(value), *origin)])


def outside_model(plan: Plan, loaded: Any) -> Iterator[tuple[str, str, float]]:
    """The share of each method's cells outside the model."""
    shares: dict[str, list[float]] = {}
    with _clock(loaded.model) as clock:
        runner = CellRunner(loaded, BATCH)
        for cell in plan.cells:
            job, before, started = plan.job(cell), clock.seconds, time.perf_counter()
            record = _done(runner.run(job).record)
            whole = time.perf_counter() - started
            shares.setdefault(record.cell.method, []).append(1 - (clock.seconds - before) / whole)
    for name, values in shares.items():
        yield name, "outside_model", median(values)


def throughput(plan: Plan, loaded: Any, repetitions: int) -> Iterator[tuple[str, str, float]]:
    """The speed of a method's test relative to that of bare forward passes."""
    model, tokenizer = loaded.model, loaded.tokenizer
    for cell in [cell for cell in plan.cells if cell.method in TESTED and cell.seed == plan.grid.seeds[0]]:
        job = plan.job(cell)
        batches = _batches(model, tokenizer, job)
        fit = method(cell.method)
        with fit(model, tokenizer, job.task, job.shots.examples, cell.seed, **cell.settings) as predictor:
            bare, tested = [], []
            for _ in range(repetitions):
                bare.append(_bare(model, batches))
                tested.append(predictor.evaluate(job.tested, batch_size=BATCH).seconds)
        yield cell.method, "throughput", median(bare) / median(tested)


class _Clock:
    """Seconds spent in forward passes, backward passes and optimizer steps."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._begun: list[float] = []

    def begin(self, *ignored: Any) -> None:
        _wait()
        self._begun.append(time.perf_counter())

    def end(self, *ignored: Any) -> None:
        _wait()
        seconds = time.perf_counter() - self._begun.pop()
        if not self._begun:  # nested calls are timed by the outer one
            self.seconds += seconds


@contextmanager
def _clock(model: Any) -> Iterator[_Clock]:
    """A clock of the model's work inside this context."""
    clock = _Clock()
    backward = torch.Tensor.backward

    def timed(*args: Any, **kwargs: Any) -> None:
        clock.begin()
        try:
            backward(*args, **kwargs)
        finally:
            clock.end()

    handles = [
        model.register_forward_pre_hook(clock.begin, prepend=True),
        model.register_forward_hook(clock.end, always_call=True),
        optimizer.register_optimizer_step_pre_hook(clock.begin),
        optimizer.register_optimizer_step_post_hook(clock.end),
    ]
    torch.Tensor.backward = timed  # type: ignore[method-assign]
    try:
        yield clock
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]
        for handle in handles:
            handle.remove()


def _plan(options: argparse.Namespace) -> Plan:
    training = {"epochs": options.epochs}
    methods = {name: training if name in ("norm-tuning", "ofa") else None for name in METHODS}
    seeds = list(range(42, 42 + options.repetitions))
    grid = {"tasks": [options.task], "methods": methods, "seeds": seeds, "test_size": options.texts}
    checked = checked_part(Grid, grid)
    return Plan(checked, options.model, read_tasks(checked))


def _batches(model: Any, tokenizer: Any, job: Job) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Ids, mask and last-token positions of the batches of a test."""
    encoder = Encoder(tokenizer, job.task, model_window(model))
    prompts = encoder.encode_prompts([example.text for example in job.tested])
    batches = []
    for indices in batches_by_length([len(prompt) for prompt in prompts], BATCH):
        ids, mask = collate([prompts[index] for index in indices], encoder.pad_id)
        last = torch.tensor([len(prompts[index]) - 1 for index in indices]).unique()
        batches.append((ids.to(model.device), mask.to(model.device), last.to(model.device)))
    return batches


@torch.no_grad()
def _bare(model: Any, batches: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> float:
    """Seconds of only the forward passes."""
    _wait()
    started = time.perf_counter()
    for ids, mask, last in batches:
        model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=last)
    _wait()
    return time.perf_counter() - started


def _done(record: Record) -> Record:
    if not record.done:
        raise RuntimeError(f"{record.cell.row} failed: {record.error}")
    return record


def _device(model: Any) -> str:
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else cpu()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
