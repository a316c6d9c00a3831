"""Training steps as CUDA graphs: captured once per shape, checked against an eager step, and replayed.

A replay launches nothing from Python, so that short steps take the device's time only. What the capture cannot do is
computed eagerly, and `reason` says why.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ofa import sharding
from ofa.errors import InputError
from ofa.models.introspection import accepted_arguments, active_dropout, dropouts, model_window
from ofa.regularizers.attach import Regularizers, attached
from ofa.regularizers.objectives import Measurements
from ofa.training.buckets import padded
from ofa.training.capture import CannotCaptureError, Capture, as_captured, capture_for

EAGER = 2
"""Eager steps of a shape before it is captured; a shape that comes once or twice is not worth a capture."""

KEPT = 8
"""Graphs that are kept, those used last."""

Batch = Mapping[str, Any]

logger = logging.getLogger(__name__)


def graphed_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    loss: Callable[[dict[str, Any]], Tensor] | None = None,
    pad: Callable[[Batch], dict[str, Any]] | None = None,
) -> GraphedStep:
    """A training step, forward and backward pass with the penalty of attached regularizers, as replayed CUDA graphs.

    Sequences are padded to a few lengths, so that shapes repeat. The first two batches of a shape are computed eagerly.
    Then the step is captured, and its first replay is compared with an eager step of the same batch, unpadded: loss,
    penalty and gradients must agree to half of the dtype's digits, else this shape stays eager, with a warning.

    Every step is eager, and `reason` says why, without a CUDA GPU, with active dropout, activation checkpointing,
    distributed or compiled wrappers, probes or `every` > 1, and where something waits for the device, such as a hook
    that prints a value. `OFA_GRAPHS=off` in the environment turns graphs off.

    Args:
        model: the model, with `fused_regularizers` attached or without.
        optimizer: steps after every backward pass, and its gradients are zeroed before. None leaves both to the caller:
            gradients are added up.
        loss: the loss of a batch of tensors on the model's device; None is the model's own, `model(**batch).loss`. It
            must be the same for a batch padded on the right; without that, pass `pad=dict`.
        pad: gives a batch one of few shapes, without changing its loss; None pads sequences to multiples of 16 tokens,
            and from 128 tokens on to four lengths per octave.

    Returns:
        The step: called with a batch, it returns the loss and the terms of the penalty.

    Raises:
        InputError: in a step, if the model returns no loss.

    Example:
        >>> optimizer = torch.optim.AdamW(ofa.tune_norms(model), lr=1e-2)
        >>> with ofa.fused_regularizers(model):
        ...     step = ofa.graphed_step(model, optimizer)
        ...     values = step(batch)
        >>> bool(values.loss > 0)
        True
        >>> step.reason
        'the model is on cpu, and CUDA graphs need a CUDA GPU'
    """
    return GraphedStep(model, optimizer, loss or _own_loss(model), pad or _to_buckets(model))


@dataclass(frozen=True)
class StepValues:
    """The terms of one step, scalars without a graph; None for a term that is not measured.

    Example:
        >>> ofa.graphed_step(model)(batch).penalty is None  # no regularizers are attached
        True
    """

    loss: Tensor
    penalty: Tensor | None = None
    step_ratio: Tensor | None = None
    sharpness: Tensor | None = None


class GraphedStep:
    """The step made by `graphed_step`, called with a batch and, without an optimizer, the weight of its loss.

    `reason` says why every step is eager (None if not), `refused` why those of a shape are, `replays` how many steps
    were replayed.

    Example:
        >>> step = ofa.graphed_step(model)
        >>> _ = step(batch, weight=0.5), step(batch, weight=0.5)  # two micro-batches of one optimizer step
        >>> step.replays, step.refused
        (0, {})
        >>> step.close()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        loss: Callable[[dict[str, Any]], Tensor],
        pad: Callable[[Batch], dict[str, Any]],
    ) -> None:
        self._model, self._optimizer, self._loss, self._pad = model, optimizer, loss, pad
        self.replays = 0
        self._start_over()

    def __call__(self, batch: Batch, weight: float = 1.0) -> StepValues:
        """Compute the gradients of `weight` times the loss of one batch, and step if there is an optimizer."""
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)
        if self._state != self._snapshot():
            self._start_over()
        with torch.enable_grad():
            values = self._eager(batch, weight) if self.reason else self._step(batch, weight)
        if self._optimizer is not None:
            self._optimizer.step()
        return values

    def close(self) -> None:
        """Free the graphs and their memory; later steps capture again."""
        self._start_over()

    def _start_over(self) -> None:
        """Look at the model as it is now, and forget graphs of what it was."""
        self._graphs: OrderedDict[object, _Graph] = OrderedDict()
        self._seen: Counter[object] = Counter()
        self.refused: dict[object, str] = {}
        self._regularizers = _measuring(self._model)
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._device = next(self._model.parameters()).device
        self._capture: Capture | None = None
        self.reason = _why_not(self._model, self._regularizers)
        if self.reason is None:
            try:
                self._capture = capture_for(self._device)
            except CannotCaptureError as error:
                self.reason = str(error)
        if self.reason is not None and self._device.type == "cuda":
            self._tell()
        self._watched = _Watched(self._model) if self._capture else None
        self._state = self._snapshot()

    def _tell(self) -> None:
        logger.info("training steps are not captured as CUDA graphs: %s", self.reason)

    def _snapshot(self) -> list[object]:
        """What a graph would not notice: compared before every step."""
        if self._watched is None:
            return [self._model.training, _measuring(self._model)]
        device = self._device.type
        cast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return [cast, *self._watched.now()]

    def _step(self, batch: Batch, weight: float) -> StepValues:
        given = self._pad(batch)
        key = _shapes(given)
        graph = self._graphs.get(key)
        if graph is None:
            values = self._eager(batch, weight)
            self._seen[key] += 1
            if self._seen[key] >= EAGER and key not in self.refused:
                self._record(key, given)
            return values
        self._graphs.move_to_end(key)
        graph.load(given, weight)
        stretched = key != _shapes(batch)
        if stretched not in graph.checked:
            return self._check(key, graph, batch, weight, stretched)
        self._replay(graph)
        return self._deliver(graph)

    def _eager(self, batch: Batch, weight: float) -> StepValues:
        return self._forward_backward(_on_device(batch, self._device), weight)

    def _forward_backward(self, batch: dict[str, Any], weight: float | Tensor) -> StepValues:
        loss, reg = self._loss(batch), self._regularizers
        total, terms = loss, StepValues(loss.detach())
        if reg is not None:
            penalty, measured = reg.penalty().to(loss.device), _detached(reg.measurements)
            total = loss if reg.in_loss else loss + penalty
            terms = StepValues(loss.detach(), penalty.detach(), measured.step_ratio, measured.sharpness)
            # The graph would keep the parameters' gradient nodes, which belong to the stream that they were made on.
            reg.replayed(reg.passes, measured)
        (total * (weight.to(total.dtype) if isinstance(weight, Tensor) else weight)).backward()
        return terms

    def _record(self, key: object, given: Batch) -> None:
        """Capture a shape's step, or say why not."""
        assert self._capture is not None
        graph = _Graph(
            _on_device(given, self._device, copy=True), torch.ones((), dtype=torch.float64, device=self._device)
        )
        with self._undisturbed(), as_captured(packed="position_ids" in given):
            try:
                self._capture.rehearse(lambda: self._fill(graph))
                self._clear()
                graph.replay = self._capture.record(lambda: self._fill(graph))
            except CannotCaptureError as error:
                self.reason, self._capture, self._watched = str(error), None, None
                self._graphs.clear()
                self._state = self._snapshot()
                self._tell()
                return
        self._graphs[key] = graph
        if len(self._graphs) > KEPT:
            old, _ = self._graphs.popitem(last=False)
            self._seen[old] = 0

    def _fill(self, graph: _Graph) -> None:
        """Compute the results that a graph holds."""
        graph.values = self._forward_backward(graph.batch, graph.weight)
        graph.gradients = [parameter.grad for parameter in self._parameters]
        graph.measured = None if self._regularizers is None else self._regularizers.measurements

    def _replay(self, graph: _Graph) -> None:
        graph.replay()
        self.replays += 1
        if self._regularizers is not None:
            self._regularizers.replayed(self._regularizers.passes + 1, graph.measured)

    def _check(self, key: object, graph: _Graph, batch: Batch, weight: float, stretched: bool) -> StepValues:
        """Compare a replay with the eager step of the same batch, and take the replay's results if they agree."""
        with self._undisturbed():
            expected = self._eager(batch, weight)
            gradients = [parameter.grad for parameter in self._parameters]
            measured = None if self._regularizers is None else self._regularizers.measurements
        self._replay(graph)
        error, most = _largest_error(graph, expected, gradients), _tolerance(self._model)
        if error <= most:
            graph.checked.add(stretched)
            return self._deliver(graph)
        del self._graphs[key]
        self.replays -= 1
        self.refused[key] = f"a replayed step differs from an eager one by {error:.1e}, and {most:.1e} is allowed"
        logger.warning("batches of shape %s are not replayed: %s", key, self.refused[key])
        if self._regularizers is not None:
            self._regularizers.replayed(self._regularizers.passes, measured)
        _add(self._parameters, gradients)
        return expected

    def _deliver(self, graph: _Graph) -> StepValues:
        _add(self._parameters, graph.gradients)
        assert graph.values is not None
        values: StepValues = _mapped(graph.values, Tensor.clone)
        return values

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Start without gradients; restore them and the regularizers' state afterwards."""
        gradients = [parameter.grad for parameter in self._parameters]
        reg = self._regularizers
        state = None if reg is None else (reg.passes, reg.measurements)
        self._clear()
        try:
            yield
        finally:
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            if reg is not None and state is not None:
                reg.replayed(*state)


@dataclass
class _Graph:
    """One captured step: its inputs, which each batch is copied into, and its results, which each replay overwrites."""

    batch: dict[str, Any]
    weight: Tensor
    values: StepValues | None = None
    gradients: Sequence[Tensor | None] = ()
    measured: Measurements | None = None
    checked: set[bool] = field(default_factory=set)
    """Whether it was compared with eager steps for batches that had its shape, and for those padded to it."""
    replay: Callable[[], None] = lambda: None

    def load(self, batch: Batch, weight: float) -> None:
        """Copy a batch into the inputs."""
        for name, value in batch.items():
            if isinstance(value, Tensor):
                self.batch[name].copy_(value, non_blocking=True)
        self.weight.fill_(weight)


class _Watched:
    """Parts of a model that a replay would not notice: modules, hooks, modes, and where the tensors are in memory."""

    def __init__(self, model: nn.Module) -> None:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self._modules = list(model.modules())
        self._of = [vars(module) for module in self._modules]
        self._hooks = [of[kind] for of in self._of for kind in kinds]
        self._config = getattr(model, "config", None)

    def now(self) -> list[object]:
        """All of it as a list that compares equal while nothing changes."""
        kept = [
            t for of in self._of for kind in ("_parameters", "_buffers") for t in of[kind].values() if t is not None
        ]
        return [
            getattr(self._config, "_attn_implementation", None),
            [of["training"] for of in self._of],
            # `fuse_layers` and others replace the forward pass by a class.
            [type(module) for module in self._modules],
            [of.get("forward") for of in self._of],
            [id(module) for of in self._of for module in of["_modules"].values()],
            list(chain.from_iterable(self._hooks)),
            [(tensor.data_ptr(), tensor.requires_grad) for tensor in kept],
        ]


def _own_loss(model: nn.Module) -> Callable[[dict[str, Any]], Tensor]:
    extra = {"use_cache": False} if "use_cache" in accepted_arguments(model) else {}

    def loss(batch: dict[str, Any]) -> Tensor:
        value = getattr(model(**{**extra, **batch}), "loss", None)
        if not isinstance(value, Tensor):
            raise InputError("the model returned no loss for this batch; give it labels, or give graphed_step a loss=")
        return value

    return loss


def _to_buckets(model: nn.Module) -> Callable[[Batch], dict[str, Any]]:
    window = model_window(model) if hasattr(model, "config") else None
    return lambda batch: padded(batch, window)


def _measuring(model: nn.Module) -> Regularizers | None:
    """The attached regularizers, unless both of their weights are 0."""
    found = attached(model)
    return found if found is not None and found.measures else None


def _why_not(model: nn.Module, regularizers: Regularizers | None) -> str | None:
    """Why the steps of a model cannot be captured; None if nothing is known against it."""
    modules = list(model.modules())
    if any(isinstance(one, nn.parallel.DistributedDataParallel) for one in modules) or sharding.is_sharded(model):
        return "several processes train the model together"
    if any(sharding.is_a(one, "torch._dynamo.eval_frame", "OptimizedModule") for one in modules):
        return "the model is compiled, for which torch.compile has graphs of its own (mode='reduce-overhead')"
    if any("_hf_hook" in vars(one) for one in modules):
        return "hooks of accelerate move weights or inputs between devices"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model is on several devices"
    dropping = active_dropout(dropouts(model))
    if dropping is not None:
        return f"dropout is active in {dropping}"
    if any(_is_checkpointing(one) for one in modules):
        return "activation checkpointing is on"
    return None if regularizers is None else regularizers.not_replayable


def _is_checkpointing(module: nn.Module) -> bool:
    wrapper = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
    own = bool(getattr(module, "gradient_checkpointing", False)) and module.training
    return own or sharding.is_a(module, wrapper, "CheckpointWrapper")


def _shapes(batch: Batch) -> object:
    """What a graph is made for: shapes and dtypes of the tensors, and the other values."""
    return tuple(
        (name, (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else repr(value))
        for name, value in sorted(batch.items())
    )


def _on_device(batch: Batch, device: torch.device, *, copy: bool = False) -> dict[str, Any]:
    return {name: value.to(device, copy=copy) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _mapped(record: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A record of tensors and Nones, each tensor changed."""
    values = {one.name: getattr(record, one.name) for one in fields(record)}
    return replace(record, **{name: change(value) for name, value in values.items() if value is not None})


def _detached(measured: Measurements) -> Measurements:
    found: Measurements = _mapped(measured, Tensor.detach)
    return found


def _add(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Add to the parameters' gradients, as a backward pass does, in a launch or two; what a graph holds is copied."""
    pairs = [(parameter, grad) for parameter, grad in zip(parameters, gradients, strict=True) if grad is not None]
    new = [(parameter, grad) for parameter, grad in pairs if parameter.grad is None]
    more = [(parameter.grad, grad) for parameter, grad in pairs if parameter.grad is not None]
    if more:
        torch._foreach_add_(*map(list, zip(*more, strict=True)))
    copies = torch._foreach_mul([grad for _, grad in new], 1) if new else []
    for (parameter, _), copied in zip(new, copies, strict=True):
        parameter.grad = copied


def _largest_error(graph: _Graph, expected: StepValues, gradients: Sequence[Tensor | None]) -> float:
    """The largest relative error of a graph's gradient as a whole, its loss and its penalty."""
    assert graph.values is not None
    found, wanted = ([g for g in kind if g is not None] for kind in (graph.gradients, gradients))
    if [one is None for one in graph.gradients] != [one is None for one in gradients]:
        return float("inf")
    pairs = [(torch.cat([g.flatten() for g in found]), torch.cat([g.flatten() for g in wanted]))]
    pairs += [(graph.values.loss, expected.loss)]
    if graph.values.penalty is not None and expected.penalty is not None:
        pairs += [(graph.values.penalty, expected.penalty)]
    tiny = torch.finfo(torch.float32).tiny
    errors = [float((own - other).norm() / other.norm().clamp_min(tiny)) for own, other in pairs]
    return max(errors) if all(error == error for error in errors) else float("nan")


def _tolerance(model: nn.Module) -> float:
    """Half of the digits of the coarsest dtype that computes: kernels of another shape round differently.

    At most those of float32, to which models of float64 round inside.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} | {torch.float32}
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize > 1) ** 0.5
