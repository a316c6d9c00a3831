"""The hooks of one branch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ofa import sharding
from ofa.anatomy import fused_norms
from ofa.anatomy.fused_layers import measure_next
from ofa.anatomy.module_io import (
    Arguments,
    hidden_input,
    hidden_output,
    repeat_batch,
    replace_hidden_output,
    replace_tensors,
)
from ofa.anatomy.steps import Branch, NormView, Step, view_norm
from ofa.errors import InputError
from ofa.regularizers.estimators import Probe, TraceEstimator
from ofa.regularizers.measured_pass import BranchEnd, MeasuredPass
from ofa.regularizers.objectives import BranchTrace
from ofa.regularizers.recompute import RecomputeTracker
from ofa.regularizers.step_length import with_length


class BranchHooks:
    """The hooks of one branch: they add the perturbed copies at its entry and remove them at its exit."""

    def __init__(
        self,
        model: nn.Module,
        index: int,
        step: Step,
        branch: Branch,
        estimator: TraceEstimator,
        layer_path: str,
        layer: RecomputeTracker,
        *,
        first: bool,
    ) -> None:
        self.index, self.step, self.branch, self.estimator = index, step, branch, estimator
        self.norm_module = model.get_submodule(branch.norm.path)
        self._layer = layer
        self._layer_path, self._layer_module = layer_path, model.get_submodule(layer_path)
        self._first = first
        """Whether the step is the first of its layer, whose stream is the layer's input."""
        self._ends_its_step = len(step.branches) == 1 and not step.adds_in_place and branch.writes != "stream"
        """Whether the branch's output alone is added to the stream, unchanged."""
        self._stream: Tensor | None = None
        self._fed: Tensor | None = None
        self._norm_input: Tensor | None = None
        self._rstd: Tensor | None = None
        """1/σ of the stream's rows, if the sum that made the stream computed it."""
        end = model.get_submodule(branch.exit)
        self.handles: list[RemovableHandle] = [
            # Prepended: tuned norms of a bfloat16 model upcast their input, and this reads the stream before.
            self.norm_module.register_forward_pre_hook(self._at_norm, with_kwargs=True, prepend=True),
            model.get_submodule(branch.entry).register_forward_pre_hook(self._at_entry, with_kwargs=True),
            # Before fully_shard's own hook, which reshards the scale.
            end.register_forward_hook(self._at_exit, prepend=sharding.is_unit(end)),
        ]
        if branch.residual_reader:
            reader = model.get_submodule(branch.residual_reader)
            self.handles.append(reader.register_forward_pre_hook(self._at_residual))

    def abandon(self) -> None:
        """Release the tensors of a branch that was entered and may never be left."""
        self._stream = self._fed = self._norm_input = self._rstd = None

    def __deepcopy__(self, memo: object) -> BranchHooks:
        raise InputError(
            "a part of a model with regularizers attached cannot be copied, nor wrapped by code that copies it; "
            "close() them before"
        )

    @property
    def current(self) -> MeasuredPass | None:
        """The pass being measured, or None."""
        return self._layer.current

    @property
    def _traced(self) -> bool:
        return self.current is not None and self.current.traced

    def _at_norm(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if self.estimator.busy:
            return
        if self.branch.reads == "normalized":
            self._see(hidden_input(args, kwargs))
        elif self._traced and not self.branch.norm_reads_stream:
            self._norm_input = hidden_input(args, kwargs)

    def _at_entry(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Arguments | None:
        if self.estimator.busy:
            return None
        entering = hidden_input(args, kwargs)
        if self.branch.reads == "stream":
            self._see(entering)
        if not self._traced:
            return None
        assert self._stream is not None
        fed = self.estimator.enter(self.branch, self._norm(), self._stream, entering, self._probe())
        self._fed = fed
        if fed is entering:
            return None
        batch, copies = entering.shape[0], self.estimator.copies

        def repeated(name: str, tensor: Tensor) -> Tensor:
            if tensor is entering:
                return fed
            return repeat_batch(name, tensor, batch, 1 + copies) if copies else tensor

        return replace_tensors(args, kwargs, repeated)

    def _at_residual(self, module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...] | None:
        if self.estimator.busy or not self._traced or self._fed is None:
            return None
        return (args[0], self._fed, *args[2:])

    def _at_exit(self, module: nn.Module, args: object, output: Any) -> object:
        if self.estimator.busy or self.current is None or not self.current.measures:
            return None
        stream, norm_input, leaving = self._stream, self._norm_input, hidden_output(output)
        norm = replace(self._norm(), rstd=self._rstd) if self.current.traced else None
        self._refuse_missing_gradient(leaving)
        assert stream is not None
        # Release tensors first: checkpointing stops a recomputation in the middle, which would keep them alive.
        self.abandon()
        ends = self.current.unfinished.pop(self.index, {})
        leaving, sqnorm, trace = self._measure(norm, stream, leaving, norm_input)
        at_sum = self.current.lengths and self._leaves_length_to_the_sum()
        measured_here = self.current.lengths and sqnorm is None and self._ends_its_step and not at_sum
        if measured_here:
            leaving, sqnorm = with_length(leaving)
        if self.step.adds_in_place:
            output = replace_hidden_output(output, leaving.clone(), lambda tensor: tensor)
        elif trace is not None or measured_here:
            batch = leaving.shape[0]
            output = replace_hidden_output(output, leaving, lambda tensor: tensor[:batch])
        weight: Any = self.norm_module.weight
        if self.branch.writes == "stream":
            ends[self.branch.exit] = BranchEnd(leaving - stream, None, trace, weight)
        else:
            ends[self.branch.exit] = BranchEnd(leaving, sqnorm, trace, weight)
        self.current.finish_branches(self.index, self.step, ends, at_sum=at_sum)
        return output

    def _leaves_length_to_the_sum(self) -> bool:
        """Whether the layer's residual sum measures the step; the last of parallel branches is followed by it."""
        assert self.current is not None
        if self.step.branches[0].entry == self._layer_path:
            return False
        return measure_next(self._layer_module, partial(self.current.take_length, self.index))

    def _refuse_missing_gradient(self, leaving: Tensor) -> None:
        assert self.current is not None
        if self.current.with_grad and not torch.is_grad_enabled():
            raise InputError(
                "reentrant activation checkpointing hides the regularizers' gradient; "
                "use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if self.current.with_grad and self.norm_module.weight.requires_grad and not leaving.requires_grad:
            raise InputError(
                f"the output of {self.branch.exit} has no gradient to {self.branch.norm.path}, whose scale would not "
                "train, because one of its layers is for inference only; load the model in a form that can be trained"
            )

    def _measure(
        self, norm: NormView | None, stream: Tensor, leaving: Tensor, norm_input: Tensor | None
    ) -> tuple[Tensor, Tensor | None, BranchTrace | None]:
        """The branch's own output, ‖output‖² per row if the estimator knows it, and the trace if it is measured."""
        assert self.current is not None
        if norm is None:
            return leaving, None, None
        if norm_input is not None and self.estimator.copies:
            norm_input = norm_input[: stream.shape[0]]
        assert self.current.shape is not None
        rows = stream.view(*self.current.shape, -1)  # OPT flattens (B, T)
        left = self.estimator.leave(self.branch, norm, rows, leaving, self._probe(), norm_input)
        return left.output, left.sqnorm, left.trace

    def _see(self, stream: Tensor) -> None:
        if self._first:
            self._layer.enter(stream)
        if self.current is None:
            return
        self.current.see_stream(stream)
        if self.current.measures:
            self._stream = stream
            ahead = fused_norms.known(self.norm_module, stream) if self.branch.norm_reads_stream else None
            self._rstd = None if ahead is None else ahead.rstd

    def _norm(self) -> NormView:
        return view_norm(self.norm_module, self.branch.norm)

    def _probe(self) -> Probe:
        assert self.current is not None
        return Probe(self.current, self.index)
