"""Decoder layers rebuilt from their anatomy: every residual sum is one operation with the norm after it.

A layer of the table is a chain of "norm, branch, add". Its sums and norms are made by `norm_step`, which reads the
stream and the branch's output once: the sum at the end of a branch computes the next norm ahead, also the next layer's
or the final one, and remembers it on the sum (`fused_norms`). The norm's module is called as before, with its hooks,
and returns the remembered rows. Layers pass each other the stream itself, so all that is between them works as before.

The gradient of a norm computed ahead does not pass through the sum's tensor. So where another library's hooks could
read that tensor, the norm is computed by itself.

`fuse_layers` replaces the class of a layer, as `fully_shard` does. Copies and pickles have the layer's own class.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from operator import attrgetter
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from transformers.cache_utils import Cache

from ofa import sharding
from ofa.anatomy import fused_norms
from ofa.anatomy import trial_run as trial
from ofa.anatomy.module_io import hidden_output
from ofa.anatomy.module_names import ACTIVATION_NAMES
from ofa.anatomy.steps import Anatomy, Branch, Norm, find, view_norm
from ofa.models.introspection import dropout_rates, dropouts
from ofa_kernels import dispatch

WIRINGS = ("sequential", "parallel", "sandwich")
"""Wirings in which a norm follows a residual sum."""


Measure = Callable[[Tensor, Tensor | None], Tensor]
"""Takes the update of a step, and ‖update‖² per row if the sum computed it; returns the update to add."""


def fuse_layers(model: nn.Module) -> dict[str, str]:
    """Replace the forward pass of each decoder layer by one that adds and normalizes in one operation.

    Outputs differ from the model's own by roundings of the residual sum at most; float32 and tuned norms give the same
    bits where a family adds in the same order. Layers run their own forward pass with dropout or activation
    checkpointing, under autocast, `torch.compile`, inference mode and function transforms, and with hooks of other
    libraries on all modules.

    Returns:
        The layers that keep their own forward pass, by path, with the reason; empty if all are fused.

    Raises:
        InputError: the model's steps are not recognized.

    Example:
        >>> params = ofa.tune_norms(model)
        >>> expected = model(**batch).loss
        >>> ofa.fuse_layers(model)
        {}
        >>> torch.testing.assert_close(model(**batch).loss, expected)
        >>> ofa.unfuse_layers(model)
    """
    model = sharding.unwrapped(model)
    unfuse_layers(model)
    anatomy = find(model)
    if anatomy.wiring not in WIRINGS or not anatomy.sublayer_steps:
        reason = f"in the wiring {anatomy.wiring!r} no norm follows a residual sum"
        return dict.fromkeys(anatomy.layers, reason)
    kept = {}
    for index, path in enumerate(anatomy.layers):
        layer = model.get_submodule(path)
        if "forward" in vars(layer):
            kept[path] = "its forward pass was replaced by another library's hook"
            continue
        vars(layer)[_CHAIN] = _chain(model, anatomy, index)
        kind: Any = type(layer)
        layer.__class__ = _fused(kind)
    for norm in _used_norms(anatomy):
        fused_norms.fuse(model.get_submodule(norm.path), norm, fused_norms.LAYERS)
    fused = [path for path in anatomy.layers if path not in kept]
    reason = _contradiction(model, fused[0]) if fused else ""
    if reason:
        unfuse_layers(model)
        return dict.fromkeys(anatomy.layers, reason)
    return kept


def unfuse_layers(model: nn.Module) -> None:
    """Give the layers back their own forward pass; does nothing to a model whose layers are not fused.

    Example:
        >>> ofa.fuse_layers(model)
        {}
        >>> ofa.unfuse_layers(model)  # its layers have their own class again
    """
    for module in model.modules():
        vars(module).pop(_CHAIN, None)
        # A class that `fully_shard` added later stays; without the chain, the layer runs its own forward pass.
        if "own_class" in vars(type(module)) and isinstance(module, FusedLayer):
            module.__class__ = module.own_class  # type: ignore[assignment]
        fused_norms.restore(module, fused_norms.LAYERS)


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse_layers` replaced the forward pass of a layer."""
    return any(_CHAIN in vars(module) for module in model.modules())


def measure_next(layer: nn.Module, measure: Measure) -> bool:
    """Let the next residual sum of a running layer pass its update to `measure`; False if the layer is not fused."""
    chain = vars(layer).get(_CHAIN)
    if chain is None or not chain.running:
        return False
    chain.measure = measure
    return True


class FusedLayer(nn.Module):
    """The base class that `fuse_layers` adds before a layer's own class."""

    own_class: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Copies and pickles are of the layer's own class: the chain holds modules of other layers."""
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        state = {name: value for name, value in vars(self).items() if name != _CHAIN}
        return _blank, (self.own_class,), state, *reduced[3:]


_CHAIN = "_ofa_chain"
"""The attribute of a fused layer that holds its chain."""


@dataclass(frozen=True)
class _Next:
    """The norm that a residual sum computes ahead, and the modules whose hooks could read the sum."""

    norm: Norm
    module: Callable[[], nn.Module]
    readers: tuple[nn.Module, ...]


@dataclass(frozen=True)
class _Part:
    """One branch: its norm, first and last module as functions of the layer, and the arguments that it takes."""

    norm: Callable[[Any], nn.Module]
    entry: Callable[[Any], nn.Module]
    exit: Callable[[Any], nn.Module] | None
    takes: frozenset[str]
    takes_any: bool

    def __call__(self, layer: nn.Module, normalized: Tensor, given: dict[str, Any]) -> Tensor:
        arguments = {
            name: value for name, value in given.items() if name in self.takes or (self.takes_any and value is not None)
        }
        output = hidden_output(self.entry(layer)(normalized, **arguments))
        if self.exit is None:
            return output
        activations = (getattr(layer, name, None) for name in ACTIVATION_NAMES)
        between = next(filter(callable, activations), None)
        return hidden_output(self.exit(layer)(output if between is None else between(output)))


@dataclass(eq=False)
class _Chain:
    """The steps of one layer."""

    steps: tuple[tuple[_Part, ...], ...]
    scale: float
    ahead: tuple[_Next | None, ...]
    """The norm after each step's sum; None after the last layer of a model without a final norm."""
    names: tuple[str, ...]
    defaults: dict[str, Any]
    dropouts: tuple[nn.Module, ...]
    running: bool = False
    measure: Measure | None = field(default=None, repr=False)

    def takes(self, layer: Any, given: dict[str, Any]) -> bool:
        """Whether this call of the layer does no more than the table says."""
        hidden = given[self.names[0]]
        if layer.training and (getattr(layer, "gradient_checkpointing", False) or self._drops()):
            return False
        return (
            type(hidden) is Tensor
            and given.get("encoder_hidden_states") is None
            and not hidden.is_inference()
            and not torch.is_inference_mode_enabled()
            and not torch.is_autocast_enabled(hidden.device.type)
            and not torch.jit.is_tracing()
            and forward_ad._current_level < 0
            and not torch._C._are_functorch_transforms_active()
            and not _has_any_global_hook()
        )

    def _drops(self) -> bool:
        return any(rate > 0 for module in self.dropouts for rate in dropout_rates(module))

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, with the defaults."""
        return {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}

    def run(self, layer: nn.Module, given: dict[str, Any]) -> Tensor:
        """The layer's output."""
        stream, given = given[self.names[0]], {k: v for k, v in given.items() if k != self.names[0]}
        self.running, self.measure = True, None
        try:
            for parts, following in zip(self.steps, self.ahead, strict=True):
                update, normalized = None, dict[nn.Module, Tensor]()
                for part in parts:
                    norm = part.norm(layer)
                    if norm not in normalized:
                        normalized[norm] = norm(stream)
                    written = part(layer, normalized[norm], given).view(stream.shape)
                    update = written if update is None else update + written
                assert update is not None
                stream = self._add(stream, update if self.scale == 1.0 else update * self.scale, following)
        finally:
            self.running, self.measure = False, None
        return stream

    def _add(self, stream: Tensor, update: Tensor, following: _Next | None) -> Tensor:
        measure, self.measure = self.measure, None
        module = None if following is None else following.module()
        if following is None or module is None or not _fits(module, following, stream, update):
            return stream + (update if measure is None else measure(update, None))
        view = view_norm(module, following.norm)
        total, normalized, sqnorm, rstd = dispatch.norm_step(
            stream,
            update,
            view.weight,
            view.bias,
            eps=view.eps,
            kind=view.kind,
            offset=view.offset,
            measured=measure is not None,
        )
        if measure is not None:
            measure(update, sqnorm)
        # A tensor of its own: the reference's graph would keep `total`, and with it the remembered rows, for ever.
        total = total.view_as(total)
        fused_norms.remember(module, total, normalized, rstd)
        return total


def _chain(model: nn.Module, anatomy: Anatomy, index: int) -> _Chain:
    path = anatomy.layers[index]
    layer, steps = model.get_submodule(path), [step for step in anatomy.sublayer_steps if step.layer == index]
    parameters = inspect.signature(type(layer).forward).parameters
    named = {name: one for name, one in list(parameters.items())[1:] if one.kind is one.POSITIONAL_OR_KEYWORD}
    defaults = {name: one.default for name, one in named.items() if one.default is not one.empty}
    norms = [*(step.branches[0].norm for step in steps[1:]), _norm_after(anatomy, index)]
    around = (layer, *map(model.get_submodule, anatomy.layers[index + 1 : index + 2]))
    readers = [*[()] * (len(steps) - 1), around]
    ahead = [None if norm is None else _next(model, norm, by) for norm, by in zip(norms, readers, strict=True)]
    holders = tuple(module for _, module in dropouts(layer))
    parts = tuple(tuple(_part(layer, path, branch) for branch in step.branches) for step in steps)
    return _Chain(parts, steps[0].scale, tuple(ahead), tuple(named), defaults, holders)


def _next(model: nn.Module, norm: Norm, readers: tuple[nn.Module, ...]) -> _Next:
    parent, _, name = norm.path.rpartition(".")
    # By its parent and name, since adapters replace modules.
    return _Next(norm, partial(getattr, model.get_submodule(parent), name), readers)


def _norm_after(anatomy: Anatomy, index: int) -> Norm | None:
    """The first norm after a layer's last sum: the next layer's, or the final one."""
    following = next((step for step in anatomy.sublayer_steps if step.layer == index + 1), None)
    if following is not None:
        return following.branches[0].norm
    inside = tuple(f"{layer}." for layer in anatomy.layers)
    outside = [norm for norm in anatomy.norms if not norm.path.startswith(inside)]
    return outside[-1] if outside else None


def _used_norms(anatomy: Anatomy) -> Iterator[Norm]:
    yield from (step.branches[0].norm for step in anatomy.sublayer_steps)
    final = _norm_after(anatomy, len(anatomy.layers) - 1)
    if final is not None:
        yield final


def _part(layer: nn.Module, path: str, branch: Branch) -> _Part:
    def inside(full: str) -> Callable[[Any], nn.Module]:
        return attrgetter(full.removeprefix(f"{path}."))

    entry = inside(branch.entry)
    parameters = list(inspect.signature(entry(layer).forward).parameters.values())[1:]
    # The other branches take the hidden states alone.
    takes = frozenset(one.name for one in parameters if branch.role == "attention")
    takes_any = branch.role == "attention" and any(one.kind is one.VAR_KEYWORD for one in parameters)
    last = None if branch.exit == branch.entry else inside(branch.exit)
    return _Part(inside(branch.norm.path), entry, last, takes, takes_any)


def _fits(module: nn.Module, following: _Next, stream: Tensor, update: Tensor) -> bool:
    """Whether the sum of these tensors computes this norm ahead."""
    return (
        fused_norms.computes_ahead(module, stream)
        and type(update) is Tensor
        and (update.dtype, update.device) == (stream.dtype, stream.device)
        and not any(map(_is_read, (module, *following.readers)))
    )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_read(module: nn.Module) -> bool:
    """Whether another library could take hold of a module's input or output."""
    return "forward" in vars(module) or any(map(_reads, (h for name in _HOOKS for h in vars(module)[name].values())))


def _reads(hook: Any) -> bool:
    origin = getattr(hook, "__module__", "")
    if origin == "transformers.utils.output_capturing":
        # It stays on the layers for ever after hidden states were asked for once.
        return "hidden_states" in (sys.modules[origin]._active_collector.get() or ())
    return not origin.startswith("ofa.")


def _contradiction(model: nn.Module, path: str) -> str:
    """Run one layer by itself and by its chain on a few tokens; what contradicts, empty if nothing does."""
    reasons: list[str] = []

    def compare(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        chain: _Chain = vars(layer)[_CHAIN]
        # The second run must not add to a key-value cache.
        given = {name: None if isinstance(v, Cache) else v for name, v in chain.given(args, kwargs).items()}
        expected = layer.own_class.forward(layer, **given)
        if isinstance(expected, tuple):
            reasons.append("its model collects hidden states between the layers, which would lose gradients")
        elif not agrees(chain.run(layer, given), expected):
            reasons.append("a trial run of the layer gave another output than its table")

    handle = model.get_submodule(path).register_forward_hook(compare, with_kwargs=True, prepend=True)
    try:
        trial.run(model, until=path)
    finally:
        handle.remove()
    return reasons[0] if reasons else ""


def agrees(found: Tensor, expected: Tensor) -> bool:
    """Whether a layer's two results differ by roundings of its sums and norms, seen at the largest element.

    Measured on every family: 0 with tuned RMSNorms; else up to 1.2 eps in half precision, where Transformers round a
    normalized row twice, and 2.5 eps in float32, where PyTorch's LayerNorm sums in another order.
    """
    allowed = 4 * torch.finfo(expected.dtype).eps * expected.detach().abs().max()
    return bool((found - expected).abs().max() <= allowed)


@cache
def _fused(own: Any) -> type[FusedLayer]:
    @wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        chain: _Chain | None = None if torch.compiler.is_compiling() else vars(self).get(_CHAIN)
        if chain is not None:
            given = chain.given(args, kwargs)
            if chain.takes(self, given):
                return chain.run(self, given)
        # Not super(): code that wrapped this forward pass may still call it after `unfuse_layers`.
        return own.forward(self, *args, **kwargs)

    # With the layer's own name: other libraries find layers by class name.
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (FusedLayer, own), {**names, "own_class": own, "forward": forward})


def _blank(own: Any) -> nn.Module:
    layer: nn.Module = own.__new__(own)
    return layer
