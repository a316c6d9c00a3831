"""One measured forward pass of the model and its measurements."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ofa.anatomy.steps import Step
from ofa.errors import InputError
from ofa.regularizers import objectives
from ofa.regularizers.objectives import BranchTrace
from ofa.regularizers.sinks import counted_tokens
from ofa.regularizers.step_length import with_length
from ofa_kernels import dispatch


@dataclass(frozen=True)
class BranchEnd:
    """A branch's output, ‖update‖² per row if already known, its trace if measured, and its scale γ."""

    update: Tensor
    sqnorm: Tensor | None
    trace: BranchTrace | None
    weight: Tensor


@dataclass
class MeasuredPass:
    """Settings of one measured forward pass, and the measurements so far.

    `mask` is 1 at real tokens and 0 at padding, (B, T), or None if every token is real; `starts` marks where a packed
    row begins another sequence. `lengths` and `traced` say what is measured, `tokens` whose lengths, `held` that the
    gradient of H is in P alone, `sign` is that of h. A pass without `keep` computes the same and discards it: the
    recomputation of a layer under activation checkpointing.
    """

    seed: int
    with_grad: bool
    lengths: bool
    tokens: str
    traced: bool
    held: bool
    sign: float
    mask: Tensor | None
    starts: Tensor | None = None
    keep: bool = True
    shape: tuple[int, int] | None = None
    squared_norms: dict[int, Tensor] = field(default_factory=dict)
    """‖update‖² per row of the stream, by step."""
    traces: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """∂H/∂γ of the branches of a step, with the curvature held fixed."""
    unfinished: dict[int, dict[str, BranchEnd]] = field(default_factory=dict)

    @property
    def measures(self) -> bool:
        """Whether lengths or traces are measured."""
        return self.lengths or self.traced

    def see_stream(self, stream: Tensor) -> None:
        """Take (B, T) from the first stream, and check the mask's shape.

        Raises:
            InputError: the attention mask and the stream differ in (B, T).
        """
        if self.shape is not None or stream.dim() != 3:
            return
        self.shape = (stream.shape[0], stream.shape[1])
        if self.mask is not None and tuple(self.mask.shape) != self.shape:
            raise InputError(
                f"the attention mask has shape {tuple(self.mask.shape)} but the hidden states have {self.shape} "
                "(sequences, tokens); pass a two-dimensional mask without cached tokens"
            )

    @property
    def real(self) -> Tensor | None:
        """Whether each sequence has a real token, (B,); None if all of them have."""
        return None if self.mask is None else self.mask.bool().any(1)

    def again(self) -> MeasuredPass:
        """The pass for recomputed layers: keeps nothing, and traces only if their gradient is not known already."""
        traced = self.traced and not self.held
        return replace(
            self, keep=False, traced=traced, shape=None, squared_norms={}, traces={}, gradients={}, unfinished={}
        )

    def take_length(self, index: int, update: Tensor, sqnorm: Tensor | None) -> Tensor:
        """Record ‖update‖² of a step from its residual sum, which computed it or not; returns the update to add."""
        if sqnorm is None:
            update, sqnorm = with_length(update)
        if self.keep:
            self.squared_norms[index] = sqnorm
        return update

    def finish_branches(self, index: int, step: Step, ends: dict[str, BranchEnd], *, at_sum: bool = False) -> None:
        """Record the measurements of a step's branches, once all parallel branches are done.

        With `at_sum`, `take_length` is called for the step's length.
        """
        if len(ends) < len(step.branches):
            self.unfinished[index] = ends
            return
        parts = tuple(ends.values())
        squared = _squared_length(parts) if self.lengths and not at_sum else None
        if not self.keep:
            return
        if squared is not None:
            self.squared_norms[index] = squared if step.scale == 1 else squared * step.scale**2
        if self.traced:
            self._finish_traces(index, self.sign * step.scale, parts)

    def _finish_traces(self, index: int, factor: float, parts: tuple[BranchEnd, ...]) -> None:
        traces = [(part.weight, part.trace) for part in parts if part.trace is not None]
        values = [trace.values for _, trace in traces]
        self.traces[index] = (sum(values[1:], values[0])) * factor
        if not self.held or not self.with_grad:
            return
        device = values[0].device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            slopes = objectives.sharpness_slopes(self.traces[index], self.real) * factor
            self.gradients[index] = [
                (weight, trace.gradient(slopes).to(weight.dtype)) for weight, trace in traces if trace.gradient
            ]

    def _squared_lengths(self) -> Tensor:
        """‖update‖² of every token, (steps, B, T), on one device."""
        assert self.shape is not None
        rows = [self.squared_norms[index] for index in sorted(self.squared_norms)]
        values = torch.stack([row.to(rows[0].device).reshape(self.shape) for row in rows])
        if values.requires_grad:
            # The gradient of a sum is an expanded scalar: make it dense once, not once per step's kernel.
            values.register_hook(Tensor.contiguous)
        return values

    def measurements(self, steps: int) -> objectives.Measurements:
        """Everything measured, as one record.

        Raises:
            RuntimeError: the forward pass skipped a step.
        """
        expected = (range(steps) if self.lengths else (), range(steps) if self.traced else ())
        if sorted(self.squared_norms) != list(expected[0]) or sorted(self.traces) != list(expected[1]):
            raise RuntimeError(
                f"the forward pass went through {max(len(self.squared_norms), len(self.traces))} of {steps} steps; "
                "layers were skipped, or the model was changed after the regularizers were attached"
            )
        norms = ratios = step_ratio = traces = sharpness = squared = counted = None
        # `real` leaves out rows that are all padding, which fill up batches of a fixed size.
        if self.lengths:
            squared = self._squared_lengths()
            mask = None if self.mask is None else self.mask.to(squared.device)
            counted = counted_tokens(self.tokens, squared, mask, self.starts)
            norms = objectives.step_norms((squared if counted is None else torch.where(counted, squared, 0)).sum(2))
            ratios = objectives.ratios(norms)
            step_ratio = objectives.step_ratio(ratios, self.real)
        if self.traced:
            device = self.traces[0].device
            traces = torch.stack([self.traces[index].to(device) for index in range(steps)])
            sharpness = objectives.sharpness(traces, self.real)
        return objectives.Measurements(norms, ratios, traces, step_ratio, sharpness, squared, counted)


def _squared_length(ends: tuple[BranchEnd, ...]) -> Tensor:
    """‖Σ updates‖² per row, over the parallel branches of a step."""
    if len(ends) == 1 and ends[0].sqnorm is not None:
        return ends[0].sqnorm
    updates = [end.update for end in ends]
    return dispatch.squared_norm(updates[0] if len(updates) == 1 else torch.stack(updates).sum(0))
