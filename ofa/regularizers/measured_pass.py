"""One measured forward pass of the model: what it measures and what it has collected."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from ofa.anatomy.steps import Step
from ofa.errors import InputError
from ofa.regularizers import objectives
from ofa.regularizers.objectives import BranchTrace
from ofa_kernels import dispatch


@dataclass(frozen=True)
class BranchEnd:
    """What a branch adds to the stream, ‖update‖² per row if it is known, and its trace and scale γ if measured."""

    update: Tensor
    sqnorm: Tensor | None
    trace: BranchTrace | None
    weight: Tensor


@dataclass(frozen=True)
class Rows:
    """Values per row of the stream, and the factor that they are all multiplied by."""

    values: Tensor
    factor: float


@dataclass
class MeasuredPass:
    """One measured forward pass: what it may measure, and what it has measured so far.

    `mask` is 1 at real tokens and 0 at padding, (B, T), or None when every token is real; `last_token_only` restricts
    the lengths of the steps to the last real token. `traced` says whether the traces of the steps are measured, `sign`
    is that of h. A pass that does not `keep` computes the same and forgets it: the second run of a layer under
    activation checkpointing. Lengths are kept as the branches return them and reduced once, for all steps together.
    """

    seed: int
    with_grad: bool
    lengths: bool
    last_token_only: bool
    traced: bool
    held: bool
    sign: float
    mask: Tensor | None
    keep: bool = True
    shape: tuple[int, int] | None = None
    squared_norms: dict[int, Rows] = field(default_factory=dict)
    traces: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """∂H/∂γ of the branches of a step, with the curvature held fixed."""
    unfinished: dict[int, dict[str, BranchEnd]] = field(default_factory=dict)

    @property
    def measures(self) -> bool:
        """Whether anything of the steps is wanted."""
        return self.lengths or self.traced

    def see_stream(self, stream: Tensor) -> None:
        """Learn (B, T) from the first stream that goes by, and hold the mask to it.

        Raises:
            InputError: the attention mask covers another number of tokens than the stream has.
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
        """Which sequences have a real token, (B,); None where all of them do."""
        return None if self.mask is None else self.mask.bool().any(1)

    def again(self) -> MeasuredPass:
        """The measurement for a layer that is run a second time; keeps nothing. A gradient in P is there already."""
        traced = self.traced and not self.held
        return replace(
            self, keep=False, traced=traced, shape=None, squared_norms={}, traces={}, gradients={}, unfinished={}
        )

    def finish_branches(self, index: int, step: Step, ends: dict[str, BranchEnd]) -> None:
        """Take what the branches of a step measured, once all parallel ones are in."""
        if len(ends) < len(step.branches):
            self.unfinished[index] = ends
            return
        parts = tuple(ends.values())
        squared = _squared_length(parts) if self.lengths else None
        if not self.keep:
            return
        if squared is not None:
            self.squared_norms[index] = Rows(squared, step.scale**2)
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

    def _squared_norms(self) -> Tensor:
        """‖update‖² over the tokens whose steps are measured, (steps, B), on one device.

        Nothing is built from Python scalars: the copy would sync, and break graph capture.
        """
        assert self.shape is not None
        rows = [self.squared_norms[index] for index in sorted(self.squared_norms)]
        device = rows[0].values.device
        values = torch.stack([row.values.to(device).reshape(self.shape) for row in rows])
        if values.requires_grad:
            # The gradient of a sum is one number expanded, and every step's kernel would make a dense copy of its own.
            values.register_hook(Tensor.contiguous)
        factors = tuple(row.factor for row in rows)
        factor: Tensor | float = factors[0]
        if len(set(factors)) > 1:
            factor = _column(factors, values)
        mask = None if self.mask is None else self.mask.to(device)
        if not self.last_token_only:
            return (values if mask is None else values * mask).sum(2) * factor
        if mask is None:
            return values[:, :, -1] * factor
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        return values.gather(2, last.view(1, -1, 1).expand(len(values), -1, 1)).squeeze(2) * factor

    def measurements(self, steps: int) -> objectives.Measurements:
        """Everything measured, as one record.

        Raises:
            RuntimeError: the forward pass did not go through every step.
        """
        expected = (range(steps) if self.lengths else (), range(steps) if self.traced else ())
        if sorted(self.squared_norms) != list(expected[0]) or sorted(self.traces) != list(expected[1]):
            raise RuntimeError(
                f"the forward pass went through {max(len(self.squared_norms), len(self.traces))} of {steps} steps; "
                "layers were skipped, or the model was changed after the regularizers were attached"
            )
        norms = ratios = step_ratio = traces = sharpness = None
        # Rows of nothing but padding fill up batches of a fixed size, and are no sequences.
        if self.lengths:
            norms = objectives.step_norms(self._squared_norms())
            ratios = objectives.ratios(norms)
            step_ratio = objectives.step_ratio(ratios, self.real)
        if self.traced:
            device = self.traces[0].device
            traces = torch.stack([self.traces[index].to(device) for index in range(steps)])
            sharpness = objectives.sharpness(traces, self.real)
        return objectives.Measurements(norms, ratios, traces, step_ratio, sharpness)


def _column(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    """Numbers as a column on the device of a tensor: brought there once, since bringing them waits for the device."""
    # Do not cache columns for fake tensors: real tensors would receive them.
    build = _kept_column if type(like) is Tensor else _kept_column.__wrapped__
    return build(numbers, like.dtype, like.device)


@lru_cache(maxsize=256)
def _kept_column(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device).unsqueeze(1)


def _squared_length(ends: tuple[BranchEnd, ...]) -> Tensor:
    """‖Σ updates‖² per row; parallel branches make one step."""
    if len(ends) == 1 and ends[0].sqnorm is not None:
        return ends[0].sqnorm
    updates = [end.update for end in ends]
    return dispatch.squared_norm(updates[0] if len(updates) == 1 else torch.stack(updates).sum(0))
