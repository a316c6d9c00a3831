"""The training loop for a few examples and a few thousand parameters (by default the norm scales).

A step depends only on the configuration, the data and the step number: batches are drawn from (seed, epoch), probes
from (seed, pass), and dropout is off. So a checkpoint holds scales, optimizer moments and counters, and a resumed run
is bit-identical.
"""

from __future__ import annotations

import json
import math
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor, nn

from ofa.adapters.folder import CHECKPOINT, METRICS
from ofa.anatomy.fused_layers import fuse_layers, is_fused, unfuse_layers
from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder
from ofa.files import claim_folder, claimed_folder
from ofa.models.introspection import evaluating, head_modules, model_window
from ofa.regularizers.attach import Regularizers, fused_regularizers
from ofa.tasks.task import Example
from ofa.training import checkpoint
from ofa.training.auto_weight import AutoWeight
from ofa.training.batches import Batches
from ofa.training.buckets import padded
from ofa.training.config import TrainingConfig
from ofa.training.graphed_step import graphed_step
from ofa.training.loss import (
    EncodedExample,
    batch_of,
    cross_entropy,
    cross_entropy_in_parts,
    cross_entropy_of,
    even_targets,
)
from ofa.training.records import StepRecord, TrainingResult, read_metrics, write_metrics
from ofa.tuning.norms import tune_norms
from ofa.tuning.relative_steps import relative_steps
from ofa_kernels import dispatch


class Guidance(Protocol):
    """Replaces the gradient of the cross-entropy."""

    def begin(self, parameters: Sequence[nn.Parameter], losses: Sequence[Callable[[], Tensor]]) -> None:
        """Called once before the first step; `losses` are of one batch each and sum to the loss over all examples."""
        ...

    def backward(self, loss: Callable[[], Tensor]) -> float:
        """Fill the parameters' gradients for one step and return the loss of its batch, in nats.

        Every call of `loss` computes the batch's cross-entropy again.
        """
        ...


class Diverged(InputError):
    """The loss, a gradient or a scale is not finite; the last good checkpoint is kept."""


class Interrupted(KeyboardInterrupt):
    """The run stopped on request after a whole step and wrote its checkpoint if it has a folder."""

    def __init__(self, step: int, path: Path | None) -> None:
        super().__init__(f"stopped after step {step}" + (f"; --resume continues from {path}" if path else ""))


def train(
    model: nn.Module,
    encoder: Encoder,
    examples: Sequence[Example],
    config: TrainingConfig,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    validate: Callable[[], float] | None = None,
    progress: Callable[[StepRecord, int], None] | None = None,
    tune: Callable[[nn.Module], Mapping[str, nn.Parameter]] | None = None,
    guidance: Guidance | None = None,
) -> TrainingResult:
    """Tune a few parameters of `model` on the examples, in eval mode, by AdamW with warm-up and cosine decay to 0.

    Loss = cross-entropy over the full vocabulary at the label's tokens + λ₁ J + λ₂ H.

    Args:
        tune: makes parameters trainable and returns them by name; None tunes the norm scales.
        guidance: replaces each step's gradient of the cross-entropy; checkpoints do not hold its state.
        folder: for the metrics and one checkpoint per epoch, created if missing; None writes nothing.
        resume: continue from the folder's checkpoint.
        validate: score (higher is better) after each epoch; the best epoch's scales are kept, without it the last's.
        progress: called after every step with its record and the total number of steps.

    Returns:
        The records of all steps, with the best epoch where there is a validation.

    Raises:
        InputError: there are no examples, the folder cannot be written, the checkpoint belongs to another run, a
            parameter gets no gradient, or guidance is combined with a folder, accumulation or regularizers.
        Diverged: a loss, gradient or scale is not finite.
        Interrupted: Ctrl-C or SIGTERM arrived; the current step was finished first.
    """
    if not examples:
        raise InputError("there is not one example to train on: give at least one")
    if resume and folder is None:
        raise InputError("only a run with a folder can be resumed: give the folder that holds its checkpoint")
    if guidance is not None and (folder is not None or config.accumulation > 1 or _regularizes(config)):
        raise InputError("a guided run keeps no folder and takes neither accumulation nor regularizers; leave them out")
    folder = None if folder is None else claim_folder(folder, overwrite=True)
    seed_everything(config.seed)
    run = _Run(
        model, Batches(encoder, examples, config), config, folder, validate, (tune or _norm_scales)(model), guidance
    )
    claimed = nullcontext() if folder is None else claimed_folder(folder, overwrite=True)
    with (
        claimed,
        evaluating(model),
        torch.enable_grad(),
        _fused(model),
        _regularized(model, config) as regularizers,
        _stop_signals() as stop,
    ):
        # Write nothing before here: the model is known to be usable now.
        if resume:
            run.resume()
        elif folder is not None:
            (folder / METRICS).write_text("")
            run.save()
        run.attach(regularizers)
        run.begin()
        for record in run.steps():
            if progress is not None:
                progress(record, run.total)
            if stop.requested:
                run.save()
                raise Interrupted(record.step, run.checkpoint_path)
    return run.finish(encoder.truncated)


def learning_rate(step: int, total: int, config: TrainingConfig) -> float:
    """Linear warm-up over the first share of the steps, then a cosine to 0; `step` counts from 0."""
    warm = math.ceil(config.warmup * total)
    if step < warm:
        return config.peak_rate * (step + 1) / warm
    return config.peak_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _norm_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    parameters = tune_norms(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: parameter for parameter in parameters}


def _groups(model: nn.Module, scales: Mapping[str, nn.Parameter], config: TrainingConfig) -> list[dict[str, Any]]:
    """The parameters of a classifier's head apart: they take `head_learning_rate`."""
    heads = tuple(f"{path}." for path in head_modules(model))
    head = {name for name in scales if heads and name.startswith(heads)}
    groups = (
        ([scale for name, scale in scales.items() if name not in head], 1.0),
        ([scales[name] for name in scales if name in head], config.head_learning_rate / config.peak_rate),
    )
    return [{"params": parameters, "factor": factor} for parameters, factor in groups if parameters]


class _Run:
    """The state of one run: the tuned parameters ("scales"), optimizer, position."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        config: TrainingConfig,
        folder: Path | None,
        validate: Callable[[], float] | None,
        scales: Mapping[str, nn.Parameter],
        guidance: Guidance | None,
    ) -> None:
        self.model, self.batches, self.config, self.folder, self.validate = model, batches, config, folder, validate
        self.guidance, self.scales, parameters = guidance, dict(scales), list(scales.values())
        self.still = set(self.scales)
        self.origin = [parameter.detach().clone() for parameter in parameters]
        groups = _groups(model, self.scales, config)
        self.optimizer = torch.optim.AdamW(groups, lr=config.peak_rate, weight_decay=config.weight_decay)
        sizes = relative_steps(self.optimizer, model).sizes if config.relative else {}
        self.auto = AutoWeight(parameters, sizes) if config.sharpness == "auto" else None
        self.steps_per_epoch = batches.per_epoch
        has_head = len(groups) > 1  # It starts from random numbers, and needs all of the steps.
        self.total = config.total_steps(self.steps_per_epoch, math.inf if has_head else batches.shots_per_class)
        self.step = 0
        self.passes = 0
        self.seconds = 0.0
        self.best: tuple[int, float, list[Tensor]] | None = None
        self.records: list[StepRecord] = []
        self.regularizers: Regularizers | None = None
        self.held: tuple[float, dict[str, Tensor]] | None = None
        """The last measured sharpness and its gradient, from the checkpoint of a resumed run."""
        # A checkpoint continues this run only if all of these are the same.
        self.identity = {
            "config": config.model_dump(),
            # The configuration does not name the defaults, which another version may change.
            "schedule": f"{self.total} steps at a learning rate of {config.peak_rate:g}",
            "data": checkpoint.digest([asdict(item) for item in batches.data]),
            "model": checkpoint.model_digest(model),
            # The rounding of sums depends on how threads split them.
            "threads": torch.get_num_threads(),
        }

    @property
    def checkpoint_path(self) -> Path | None:
        return None if self.folder is None else self.folder / CHECKPOINT

    def attach(self, regularizers: Regularizers | None) -> None:
        self.regularizers = regularizers
        # After the regularizers are attached, which it looks for.
        self.forward_backward = graphed_step(
            self.model,
            loss=lambda batch: cross_entropy_of(self.model, batch),
            pad=lambda batch: padded(even_targets(batch), model_window(self.model)),
        )
        if regularizers is None:
            return
        regularizers.passes = self.passes
        if self.held is not None:
            value, gradients = self.held
            pairs = [(self.scales[name], gradient.to(self.scales[name].device)) for name, gradient in gradients.items()]
            regularizers.schedule.resume(self.step, pairs[0][1].new_tensor(value), pairs)

    def begin(self) -> None:
        """Give the guidance, if there is one, the loss over all examples."""
        if self.guidance is not None:
            losses = cross_entropy_in_parts(self.model, self.batches.data, self.config.batch_size)
            self.guidance.begin(list(self.scales.values()), losses)

    def steps(self) -> Iterator[StepRecord]:
        """Take the remaining steps; validate and save after each epoch."""
        started = time.perf_counter() - self.seconds
        while self.step < self.total and not self._has_learned():
            record = self._take_step(started)
            self.records.append(record)
            self._log(record)
            if self.step % self.steps_per_epoch == 0 or self.step == self.total:
                self._end_epoch(record.epoch)
            yield record

    def _has_learned(self) -> bool:
        """Whether the mean loss of an epoch that just ended is below `stop_loss`."""
        if self.config.stop_loss is None or self.step == 0 or self.step % self.steps_per_epoch:
            return False
        losses = [record.loss for record in self.records[-self.steps_per_epoch :]]
        return sum(losses) / len(losses) < self.config.stop_loss

    def finish(self, truncated: int) -> TrainingResult:
        """Restore the best epoch's scales, if there was a validation, and return the result."""
        if self.best is not None:
            self._restore(self.best[2])
        return TrainingResult(tuple(self.records), self.seconds, truncated, self.config, self.best and self.best[0])

    def _take_step(self, started: float) -> StepRecord:
        step, epoch = self.step, self.step // self.steps_per_epoch
        rate = learning_rate(step, self.total, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        totals = {"loss": 0.0, "step_ratio": 0.0, "sharpness": 0.0, "penalty": 0.0}
        batch = self.batches.of(step)
        if self.guidance is not None:
            totals["loss"] = self.guidance.backward(lambda: cross_entropy(self.model, batch))
        else:
            for start in range(0, len(batch), self.config.batch_size):
                part = batch[start : start + self.config.batch_size]
                for name, value in self._backward(part, len(part) / len(batch)).items():
                    totals[name] += value
        if self.auto is not None:
            totals["penalty"] += self.auto.add() * totals["sharpness"]
        self._check_finite("loss", totals["loss"] + totals["penalty"], step + 1)
        gradient_norm = self._gradient_norm()
        # Before the step, so that a checkpoint never gets bad scales.
        self._check_finite("gradient", gradient_norm, step + 1)
        self.optimizer.step()
        self.step += 1
        if self.regularizers is not None:
            self.passes = self.regularizers.passes
        self.seconds = time.perf_counter() - started
        return StepRecord(
            step=self.step,
            epoch=epoch + 1,
            loss=totals["loss"],
            step_ratio=totals["step_ratio"] if self.config.step_ratio > 0 else None,
            sharpness=totals["sharpness"] if self.config.sharpness != 0 else None,
            penalty=totals["penalty"],
            learning_rate=rate,
            gradient_norm=gradient_norm,
            drift=self._drift(),
            seconds=round(self.seconds, 4),
        )

    def _backward(self, part: Sequence[EncodedExample], share: float) -> dict[str, float]:
        """Add the gradient of one micro-batch, weighted by its `share` of the step's examples; return its terms."""
        if self.auto is not None:
            return self._backward_apart(self.auto, part, share)
        values = self.forward_backward(batch_of(part), share)
        found = {one.name: getattr(values, one.name) for one in fields(values)}
        return {name: share * value.item() for name, value in found.items() if value is not None}

    def _backward_apart(self, auto: AutoWeight, part: Sequence[EncodedExample], share: float) -> dict[str, float]:
        """The same with the sharpness's gradient set apart, whose weight the whole step's gradients give."""
        assert self.regularizers is not None
        loss = cross_entropy(self.model, part)
        measured = self.regularizers.measurements
        assert measured.sharpness is not None
        auto.pull(share * measured.sharpness.to(loss.device))
        penalty = torch.zeros_like(loss)
        if measured.step_ratio is not None:
            penalty = self.config.step_ratio * measured.step_ratio.to(loss.device)
        (share * (loss + penalty)).backward()
        found = {"loss": loss, "penalty": penalty, "step_ratio": measured.step_ratio, "sharpness": measured.sharpness}
        return {name: share * value.item() for name, value in found.items() if value is not None}

    def _gradient_norm(self) -> float:
        gradients = {name: scale.grad for name, scale in self.scales.items()}
        self._check_all_are_tuned(gradients)
        norms = [gradient.norm() for gradient in gradients.values() if gradient is not None]
        return float(torch.stack(norms).norm())

    def _check_all_are_tuned(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Refuse parameters without a gradient; it may be zero in the first two steps.

        LoRA's A has none while B = 0, and B none while an encoder's new head is 0.
        """
        if self.still:
            self.still = {name for name in self.still if (grad := gradients[name]) is None or not grad.any()}
        unused = [name for name in self.still if gradients[name] is None or self.step > 1]
        if unused:
            raise InputError(
                f"{len(unused)} of {len(gradients)} tuned parameters, such as {min(unused)}, got no gradient in the "
                "first steps and would not be tuned; tune parameters that the model uses and that nothing detaches"
            )

    def _drift(self) -> float:
        moved = torch.stack([(p.detach() - o).norm() for p, o in zip(self.scales.values(), self.origin, strict=True)])
        return float(moved.norm() / torch.stack([o.norm() for o in self.origin]).norm())

    def _check_finite(self, what: str, value: float, step: int) -> None:
        if math.isfinite(value):
            return
        kept = f"the checkpoint of the last good epoch is {self.checkpoint_path}" if self.folder else "nothing is kept"
        raise Diverged(f"the {what} is {value} at step {step} of {self.total}; {kept}; try a lower learning rate")

    def _end_epoch(self, epoch: int) -> None:
        broken = next((name for name, scale in self.scales.items() if not torch.isfinite(scale).all()), None)
        if broken:
            self._check_finite(f"scale {broken}", float("nan"), self.step)
        if self.validate is not None:
            score = self.validate()
            if self.best is None or score > self.best[1]:
                self.best = (epoch, score, [scale.detach().clone() for scale in self.scales.values()])
        self.save()

    @torch.no_grad()
    def _restore(self, scales: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.scales.values(), scales, strict=True):
            parameter.copy_(value)

    def save(self) -> None:
        """Write the checkpoint, if the run has a folder."""
        if self.checkpoint_path is None:
            return
        state = checkpoint.Checkpoint(
            step=self.step,
            passes=self.passes,
            seconds=self.seconds,
            run=self.identity,
            scales={name: scale.detach() for name, scale in self.scales.items()},
            moments=checkpoint.moments(self.optimizer, self.scales),
            best=self.best and (self.best[0], self.best[1], dict(zip(self.scales, self.best[2], strict=True))),
            held=self._held(),
        )
        checkpoint.save(self.checkpoint_path, state)

    def _held(self) -> tuple[float, dict[str, Tensor]] | None:
        held = None if self.regularizers is None else self.regularizers.schedule.held()
        if held is None:
            return None
        names = {id(scale): name for name, scale in self.scales.items()}
        return held[0].item(), {names[id(weight)]: gradient for weight, gradient in held[1]}

    def resume(self) -> None:
        """Continue from the folder's checkpoint; drop metrics of later steps, which are taken again."""
        assert self.folder is not None
        assert self.checkpoint_path is not None
        state = checkpoint.load(self.checkpoint_path, self.identity, self.scales)
        self._restore([state.scales[name] for name in self.scales])
        checkpoint.restore_moments(self.optimizer, self.scales, state)
        self.step, self.passes, self.seconds = state.step, state.passes, state.seconds
        self.held = state.held
        if state.best is not None:
            epoch, score, scales = state.best
            self.best = (epoch, score, [scales[name] for name in self.scales])
        self.records = [record for record in read_metrics(self.folder) if record.step <= self.step]
        write_metrics(self.folder, self.records)

    def _log(self, record: StepRecord) -> None:
        if self.folder is None:
            return
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")


@contextmanager
def _fused(model: nn.Module) -> Iterator[None]:
    """Fuse the decoder layers where the kernels run, unless they are fused or not recognized."""
    fuses = dispatch.choose("norm_step", next(model.parameters())).name == "triton" and not is_fused(model)
    if fuses:
        with suppress(InputError):
            fuse_layers(model)
    try:
        yield
    finally:
        if fuses:
            unfuse_layers(model)


def _regularized(model: nn.Module, config: TrainingConfig) -> AbstractContextManager[Regularizers | None]:
    """The regularizers of the configuration as a context, or nothing where both weights are 0."""
    if not _regularizes(config):
        return nullcontext()
    return fused_regularizers(model, **config.regularizer_options)


def _regularizes(config: TrainingConfig) -> bool:
    return config.step_ratio > 0 or config.sharpness != 0


class _Stop:
    requested = False


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn the first Ctrl-C or SIGTERM into a request; a second Ctrl-C interrupts at once, as usual."""
    stop = _Stop()

    def request(number: int, frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.signal(number, request)
        except ValueError:  # only the main thread may set handlers
            break
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
