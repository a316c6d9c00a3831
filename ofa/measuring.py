"""What happens at one branch while a forward pass is measured, and what a pass collects."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ofa import objectives, sharding
from ofa.anatomy import Branch, NormView, Step, view_norm
from ofa.errors import InputError
from ofa.estimators import Probe, TraceEstimator
from ofa.module_io import hidden_input, hidden_output, replace_hidden_output, replace_tensors
from ofa.objectives import BranchTrace
from ofa.step_length import with_length
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
class Pass:
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

    def again(self) -> Pass:
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


class LayerPass:
    """The pass that a decoder layer is being measured for; shared by the branches of the layer.

    Non-reentrant activation checkpointing runs a layer again in the backward pass, maybe after other forward passes,
    and must meet the probes and the mask of its own forward. The stream that enters the layer tells which pass it
    belongs to: it is the very tensor that the layer was first called with, or, where checkpoints are offloaded, a copy
    of it that comes from the same place in the graph. Any other call of a layer from outside a forward pass of the
    model is not measured.
    """

    def __init__(self) -> None:
        self.current: Pass | None = None
        self._again: Pass | None = None
        self._passes = WeakTensorKeyDictionary()
        """By stream, for streams that are constants."""
        self._node: Node | None = None

    def begin(self, current: Pass, again: Pass) -> None:
        """A measured forward pass of the model starts; `again` serves the second runs of this layer."""
        self.current, self._again = current, again

    def end(self) -> None:
        """No forward pass of the model is being measured."""
        self.current = self._again = self._node = None

    def enter(self, stream: Tensor) -> None:
        """The stream enters the layer: remember its pass, or recall it."""
        if torch.compiler.is_compiling():
            return
        if self._again is None:
            self.current = self._recall(stream) if torch.is_grad_enabled() else None
        elif self._again.with_grad:
            self._remember(stream, self._again)

    def _remember(self, stream: Tensor, again: Pass) -> None:
        if not stream.requires_grad:
            self._passes[stream] = again
            return
        node, output = _origin(stream)
        node.metadata[self, output] = again  # type: ignore[index]
        self._node = node  # that of a leaf is held by nobody else until something is computed from it

    def _recall(self, stream: Tensor) -> Pass | None:
        if not stream.requires_grad:
            return self._passes.get(stream)
        node, output = _origin(stream)
        return node.metadata.get((self, output))  # type: ignore[attr-defined]


def _origin(stream: Tensor) -> tuple[Node, int]:
    """Where in the graph a tensor comes from, and which output it is there.

    Not FSDP2's own node in front of a layer: in PyTorch 2.11 every run of the layer has a new one.
    """
    edge = get_gradient_edge(stream)
    node, output = edge.node, edge.output_nr
    while node.name() == "RegisterPostBackwardFunctionBackward":
        following, output = node.next_functions[output]
        assert following is not None
        node = following
    return node, output


class BranchMeter:
    """The hooks of one branch: feed the displaced copies in at its entry, take them out again at its exit."""

    def __init__(
        self,
        model: nn.Module,
        index: int,
        step: Step,
        branch: Branch,
        estimator: TraceEstimator | None,
        layer: LayerPass,
        *,
        first: bool,
    ) -> None:
        self.index, self.step, self.branch, self.estimator = index, step, branch, estimator
        self.norm_module = model.get_submodule(branch.norm.path)
        self._layer = layer
        self._first = first
        """Whether the step is the first of its layer: it sees the tensor that the layer was called with."""
        self._ends_its_step = len(step.branches) == 1 and not step.adds_in_place and branch.writes != "stream"
        """Whether what leaves the branch, and nothing else, is added to the stream as it is."""
        self._stream: Tensor | None = None
        self._fed: Tensor | None = None
        self._norm_input: Tensor | None = None
        end = model.get_submodule(branch.exit)
        self.handles: list[RemovableHandle] = [
            # First in line: tuned norms of a bfloat16 model widen their input, and the stream itself is wanted.
            self.norm_module.register_forward_pre_hook(self._at_norm, with_kwargs=True, prepend=True),
            model.get_submodule(branch.entry).register_forward_pre_hook(self._at_entry, with_kwargs=True),
            # Ahead of fully_shard's own hook, behind which the scale is in parts again.
            end.register_forward_hook(self._at_exit, prepend=sharding.is_unit(end)),
        ]
        if branch.residual_reader:
            reader = model.get_submodule(branch.residual_reader)
            self.handles.append(reader.register_forward_pre_hook(self._at_residual))

    def abandon(self) -> None:
        """The branch may never be left: let go of what entered it."""
        self._stream = self._fed = self._norm_input = None

    def __deepcopy__(self, memo: Any) -> BranchMeter:
        raise InputError(
            "a part of a model with regularizers attached cannot be copied, nor wrapped by what copies it; close() "
            "them before"
        )

    @property
    def current(self) -> Pass | None:
        """The pass being measured; None where nothing is."""
        return self._layer.current

    @property
    def _traced(self) -> bool:
        return self.current is not None and self.current.traced

    @property
    def _busy(self) -> bool:
        return self.estimator is not None and self.estimator.busy

    def _at_norm(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._busy:
            return
        if self.branch.reads == "normalized":
            self._see(hidden_input(args, kwargs))
        elif self._traced and not self.branch.norm_reads_stream:
            self._norm_input = hidden_input(args, kwargs)

    def _at_entry(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._busy:
            return None
        entering = hidden_input(args, kwargs)
        if self.branch.reads == "stream":
            self._see(entering)
        if not self._traced:
            return None
        assert self.estimator is not None
        assert self._stream is not None
        fed = self.estimator.enter(self.branch, self._norm(), self._stream, entering, self._probe())
        self._fed = fed
        if fed is entering:
            return None
        batch, copies = entering.shape[0], self.estimator.copies

        def widen(name: str, tensor: Tensor) -> Tensor:
            if tensor is entering:
                return fed
            if not copies:
                return tensor
            # Falcon's alibi has (batch · heads) first; the rest either leads with the batch or broadcasts over it.
            batched = name == "alibi" or (tensor.dim() >= 2 and tensor.shape[0] == batch)
            return tensor.repeat(1 + copies, *[1] * (tensor.dim() - 1)) if batched else tensor

        return replace_tensors(args, kwargs, widen)

    def _at_residual(self, module: nn.Module, args: Any) -> Any:
        if self._busy or not self._traced or self._fed is None:
            return None
        return (args[0], self._fed, *args[2:])

    def _at_exit(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._busy or self.current is None or not self.current.measures:
            return None
        if self.current.with_grad and not torch.is_grad_enabled():
            raise InputError(
                "reentrant activation checkpointing hides the regularizers' gradient; "
                "use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        stream, norm_input, leaving = self._stream, self._norm_input, hidden_output(output)
        if self.current.with_grad and self.norm_module.weight.requires_grad and not leaving.requires_grad:
            raise InputError(
                f"{self.branch.exit} returns nothing that gradients could follow to {self.branch.norm.path}, whose "
                "scale would not train; a layer in it is for inference only, so load the model in a form that can be "
                "trained"
            )
        sqnorm = trace = None
        assert stream is not None
        # Let go of everything first: checkpointing stops a second run in the middle, and its tensors would stay.
        self._stream = self._fed = self._norm_input = None
        ends = self.current.unfinished.pop(self.index, {})
        if self.current.traced:
            assert self.estimator is not None
            if norm_input is not None and self.estimator.copies:
                norm_input = norm_input[: stream.shape[0]]
            assert self.current.shape is not None
            rows = stream.view(*self.current.shape, -1)  # OPT flattens sequences and tokens
            left = self.estimator.leave(self.branch, self._norm(), rows, leaving, self._probe(), norm_input)
            leaving, sqnorm, trace = left.output, left.sqnorm, left.trace
        on_the_way = self.current.lengths and sqnorm is None and self._ends_its_step
        if on_the_way:
            leaving, sqnorm = with_length(leaving)
        if self.step.adds_in_place:
            output = replace_hidden_output(output, leaving.clone(), lambda tensor: tensor)
        elif trace is not None or on_the_way:
            batch = leaving.shape[0]
            output = replace_hidden_output(output, leaving, lambda tensor: tensor[:batch])
        weight: Any = self.norm_module.weight
        if self.branch.writes == "stream":
            ends[self.branch.exit] = BranchEnd(leaving - stream, None, trace, weight)
        else:
            ends[self.branch.exit] = BranchEnd(leaving, sqnorm, trace, weight)
        self.current.finish_branches(self.index, self.step, ends)
        return output

    def _see(self, stream: Tensor) -> None:
        if self._first:
            self._layer.enter(stream)
        if self.current is None:
            return
        self.current.see_stream(stream)
        if self.current.measures:
            self._stream = stream

    def _norm(self) -> NormView:
        return view_norm(self.norm_module, self.branch.norm)

    def _probe(self) -> Probe:
        assert self.current is not None
        return Probe(self.current, self.index)
