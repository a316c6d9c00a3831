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
from ofa.step_length import with_length
from ofa_kernels import dispatch


@dataclass(frozen=True)
class BranchEnd:
    """What a branch adds to the stream, ‖update‖² per row if it is known, and what its trace is made of if measured."""

    update: Tensor
    sqnorm: Tensor | None
    trace: Rows | None


@dataclass(frozen=True)
class Rows:
    """Values per row of the stream, (rows) or (probes, rows), and the factor that they are all multiplied by."""

    values: Tensor
    factor: float


@dataclass
class Pass:
    """One measured forward pass: what it may measure, and what it has measured so far.

    `mask` is 1 at real tokens and 0 at padding, (B, T), or None when every token is real; `last_token_only` restricts
    the lengths of the steps to the last real token. `traced` holds the steps whose trace is measured. A pass that does
    not `keep` computes the same and forgets it: the second run of a layer under activation checkpointing. Rows are kept
    as the branches return them and reduced once, for all steps together.
    """

    seed: int
    with_grad: bool
    lengths: bool
    last_token_only: bool
    traced: frozenset[int]
    sign: float
    mask: Tensor | None
    keep: bool = True
    shape: tuple[int, int] | None = None
    squared_norms: dict[int, Rows] = field(default_factory=dict)
    traces: dict[int, Rows] = field(default_factory=dict)
    unfinished: dict[int, dict[str, BranchEnd]] = field(default_factory=dict)

    def measures(self, index: int) -> bool:
        """Whether anything of a step is wanted."""
        return self.lengths or index in self.traced

    @property
    def real(self) -> Tensor | None:
        """Which rows are sequences, (B,): those of nothing but padding fill up batches of a fixed size."""
        return None if self.mask is None else self.mask.bool().any(1)

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

    def again(self) -> Pass:
        """The same measurement for a layer that is run a second time; keeps nothing."""
        return replace(self, keep=False, shape=None, squared_norms={}, traces={}, unfinished={})

    def finish_branches(self, index: int, step: Step, ends: dict[str, BranchEnd]) -> None:
        """Take what the branches of a step measured, once all parallel ones are in."""
        if len(ends) < len(step.branches):
            self.unfinished[index] = ends
            return
        parts = tuple(ends.values())
        squared = _squared_length(parts) if self.lengths else None
        traces = [part.trace for part in parts if part.trace is not None]
        if not self.keep:
            return
        if squared is not None:
            self.squared_norms[index] = Rows(squared, step.scale**2)
        if traces:
            values = sum((trace.values for trace in traces[1:]), traces[0].values)
            self.traces[index] = Rows(values, self.sign * step.scale * traces[0].factor)

    def _stack(self, measured: dict[int, Rows]) -> tuple[Tensor, Tensor | float, Tensor | None]:
        """Values of all steps, (steps, probes or 1, B, T), the factor of them all, and the mask, on one device.

        Nothing is made from numbers of the host: a copy would make it wait for the device, and end a CUDA graph.
        """
        assert self.shape is not None
        rows = [measured[index] for index in sorted(measured)]
        device = rows[0].values.device
        values = torch.stack([row.values.to(device).reshape(-1, *self.shape) for row in rows])
        if values.requires_grad:
            # Behind a sum it is one number expanded, and every step's kernel would make a dense copy of its own.
            values.register_hook(Tensor.contiguous)
        factors = tuple(row.factor for row in rows)
        factor: Tensor | float = factors[0]
        if len(set(factors)) > 1:
            factor = _column(factors, values)
        mask = None if self.mask is None else self.mask.to(device)
        return values, factor, mask

    def _squared_norms(self) -> Tensor:
        """‖update‖² over the tokens whose steps are measured, (steps, B)."""
        values, factor, mask = self._stack(self.squared_norms)
        values = values.squeeze(1)
        if not self.last_token_only:
            return (values if mask is None else values * mask).sum(2) * factor
        if mask is None:
            return values[:, :, -1] * factor
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        return values.gather(2, last.view(1, -1, 1).expand(len(values), -1, 1)).squeeze(2) * factor

    def _traces(self) -> Tensor:
        """Mean of tr(J_i P_i) over the real tokens of each sequence, (measured steps, B)."""
        values, factor, mask = self._stack(self.traces)
        values = values.squeeze(1) if values.shape[1] == 1 else values.sum(1)
        if mask is None:
            return values.mean(2) * factor
        return (values * mask).sum(2) / mask.sum(1).clamp_min(1) * factor

    def _among(self, measured: Tensor, steps: int) -> Tensor:
        """Rows of the traced steps where they belong, NaN in those of the others."""
        rows = dict(zip(sorted(self.traced), measured.unbind(), strict=True))
        missing = torch.full_like(measured[0], float("nan"))
        return torch.stack([rows.get(step, missing) for step in range(steps)])

    def measurements(self, steps: int) -> objectives.Measurements:
        """Everything measured, as one record.

        Raises:
            RuntimeError: the forward pass did not go through every step.
        """
        expected = (range(steps) if self.lengths else (), sorted(self.traced))
        if sorted(self.squared_norms) != list(expected[0]) or sorted(self.traces) != expected[1]:
            raise RuntimeError(
                f"the forward pass went through {max(len(self.squared_norms), len(self.traces))} of {steps} steps; "
                "layers were skipped, or the model was changed after the regularizers were attached"
            )
        norms = ratios = step_ratio = traces = sharpness = None
        if self.lengths:
            norms = objectives.step_norms(self._squared_norms())
            ratios = objectives.ratios(norms)
            step_ratio = objectives.step_ratio(ratios, self.real)
        if self.traced:
            measured = self._traces()
            sharpness = objectives.sharpness(measured, steps, self.real)
            traces = measured if len(measured) == steps else self._among(measured, steps)
        return objectives.Measurements(norms, ratios, traces, step_ratio, sharpness)


def _column(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    """Numbers as a column on the device of a tensor: brought there once, since bringing them waits for the device."""
    # A tensor without data is not to be kept for those that have some.
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

    def _at_norm(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.branch.reads == "normalized":
            self._see(hidden_input(args, kwargs))
        elif self.current is not None and self.index in self.current.traced and not self.branch.norm_reads_stream:
            self._norm_input = hidden_input(args, kwargs)

    def _at_entry(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        entering = hidden_input(args, kwargs)
        if self.branch.reads == "stream":
            self._see(entering)
        if self.current is None or self.index not in self.current.traced:
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
        if self.current is None or self.index not in self.current.traced:
            return None
        return (args[0], self._fed, *args[2:])

    def _at_exit(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.current is None or not self.current.measures(self.index):
            return None
        if self.current.with_grad and not torch.is_grad_enabled():
            raise InputError(
                "reentrant activation checkpointing hides the regularizers' gradient; "
                "use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        stream, norm_input, leaving = self._stream, self._norm_input, hidden_output(output)
        sqnorm = trace = None
        assert stream is not None
        # Let go of everything first: checkpointing stops a second run in the middle, and its tensors would stay.
        self._stream = self._fed = self._norm_input = None
        ends = self.current.unfinished.pop(self.index, {})
        if self.index in self.current.traced:
            assert self.estimator is not None
            left = self.estimator.leave(self.branch, self._norm(), stream, leaving, self._probe())
            leaving, sqnorm, products = left.output, left.sqnorm, left.products
            if not self.branch.norm_reads_stream:
                assert norm_input is not None
                norm = self.branch.norm
                products = products * dispatch.rstd(norm_input[: leaving.shape[0]], eps=norm.eps, kind=norm.kind)
            trace = Rows(products, left.factor)
        on_the_way = self.current.lengths and sqnorm is None and self._ends_its_step
        if on_the_way:
            leaving, sqnorm = with_length(leaving)
        if self.step.adds_in_place:
            output = replace_hidden_output(output, leaving.clone(), lambda tensor: tensor)
        elif trace is not None or on_the_way:
            batch = leaving.shape[0]
            output = replace_hidden_output(output, leaving, lambda tensor: tensor[:batch])
        if self.branch.writes == "stream":
            ends[self.branch.exit] = BranchEnd(leaving - stream, None, trace)
        else:
            ends[self.branch.exit] = BranchEnd(leaving, sqnorm, trace)
        self.current.finish_branches(self.index, self.step, ends)
        return output

    def _see(self, stream: Tensor) -> None:
        if self._first:
            self._layer.enter(stream)
        if self.current is None:
            return
        self.current.see_stream(stream)
        if self.current.measures(self.index):
            self._stream = stream

    def _norm(self) -> NormView:
        return view_norm(self.norm_module, self.branch.norm)

    def _probe(self) -> Probe:
        assert self.current is not None
        return Probe(self.current, self.index)
