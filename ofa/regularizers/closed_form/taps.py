"""Hooks that collect the activations of a branch, between its entry and its last projection.

A tap collects after `start`, and `take` at the branch's end returns and releases the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ofa.anatomy.module_io import hidden_input, hidden_output
from ofa.regularizers.closed_form import attention_interface
from ofa.regularizers.closed_form.attention_interface import AttentionCall, AttentionObserver
from ofa.regularizers.closed_form.modules import AttentionModules, ExpertsModules, MlpModules


@dataclass(frozen=True)
class MlpSeen:
    """Activations of one MLP: input, pre-activations, and input of the last projection."""

    entering: Tensor
    gate: Tensor
    up: Tensor | None
    hidden: Tensor


@dataclass(frozen=True)
class ExpertsSeen:
    """Activations of one mixture of experts: input, (tokens, d), the router's outputs, and output, (tokens, d).

    `logits` are those of all experts, (tokens, E); `gates` and `chosen` are of the chosen ones, (tokens, k).
    """

    entering: Tensor
    logits: Tensor
    gates: Tensor
    chosen: Tensor
    output: Tensor


@dataclass(frozen=True)
class AttentionSeen:
    """Activations of one attention: input, arguments of the attention function, and input of the last projection.

    `call` is None if the attention function cannot be captured; `projected` are then the outputs of the query, key and
    value projections. `positions` is the module's argument (cos, sin), `rest` its other arguments. `query_entering` and
    `key_entering` are the inputs of the norms on heads.
    """

    entering: Tensor
    call: AttentionCall | None
    projected: tuple[Tensor, Tensor, Tensor] | None
    positions: tuple[Tensor, Tensor] | None
    rest: dict[str, Any]
    query_entering: Tensor | None
    key_entering: Tensor | None
    output: Tensor


Seen = MlpSeen | ExpertsSeen | AttentionSeen


class Tap:
    """The hooks of one branch."""

    def __init__(self, last: nn.Module) -> None:
        self._last = last
        self._open = False
        self._kept: dict[str, Any] = {}
        self._seen: Any = None
        self.handles: list[RemovableHandle] = [last.register_forward_pre_hook(self._at_last)]

    @property
    def started(self) -> bool:
        """Whether the tap is collecting, or has activations to take."""
        return self._open or self._seen is not None

    def start(self, entering: Tensor) -> None:
        """Collect until the last projection."""
        self._open, self._seen = True, None
        self._kept = {"entering": entering}

    def stop(self) -> None:
        """Stop collecting and release everything."""
        self._open, self._kept, self._seen = False, {}, None

    def take(self) -> Any:
        """The activations since `start`; None if the last projection was not reached."""
        seen = self._seen
        self.stop()
        return seen

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any = None) -> None:
            if self._open:
                self._kept[name] = args[0] if output is None else output

        return hook

    def _at_last(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._open:
            self._seen = self._finish(args[0])
            self._open, self._kept = False, {}

    def _finish(self, entering_last: Tensor) -> Seen:
        raise NotImplementedError


class MlpTap(Tap):
    """Collects an `MlpSeen`."""

    def __init__(self, modules: MlpModules) -> None:
        super().__init__(modules.down.module)
        self._modules = modules
        self.handles.append(modules.gate.module.register_forward_hook(self._keep("gate")))
        if modules.up is not None and not modules.fused:
            self.handles.append(modules.up.module.register_forward_hook(self._keep("up")))

    def _finish(self, entering_last: Tensor) -> MlpSeen:
        gate, up = self._kept["gate"], self._kept.get("up")
        if self._modules.fused:
            gate, up = gate.chunk(2, -1)
        return MlpSeen(self._kept["entering"], gate, up, entering_last)


class ExpertsTap(Tap):
    """Collects an `ExpertsSeen`."""

    def __init__(self, modules: ExpertsModules) -> None:
        self._open, self._kept, self._seen = False, {}, None
        self.handles = [
            modules.router.register_forward_hook(self._keep("router")),
            # Before the branch's own hook on the same module.
            modules.block.register_forward_hook(self._at_end, prepend=True),
        ]

    def _at_end(self, module: nn.Module, args: object, output: Any) -> None:
        if self._open and "router" in self._kept:
            entering = self._kept["entering"]
            width = entering.shape[-1]
            logits, gates, chosen = self._kept["router"]
            self._seen = ExpertsSeen(
                entering.reshape(-1, width), logits, gates, chosen, hidden_output(output).reshape(-1, width)
            )
            self._open, self._kept = False, {}


class AttentionTap(Tap, AttentionObserver):
    """Collects an `AttentionSeen`."""

    def __init__(self, modules: AttentionModules) -> None:
        super().__init__(modules.output.module)
        self._modules = modules
        module = modules.module
        # This hook also makes the tap an `AttentionObserver` of the module.
        self.handles.append(module.register_forward_pre_hook(self._at_module, with_kwargs=True))
        if not attention_interface.supports(module):
            for name, linear in (("query", modules.query), ("key", modules.key), ("value", modules.value)):
                self.handles.append(linear.module.register_forward_hook(self._keep(name)))
        for name, norm in (("query_norm", modules.query_norm), ("key_norm", modules.key_norm)):
            if norm is not None:
                # Prepended: tuned norms of a bfloat16 model upcast their input.
                self.handles.append(norm.register_forward_pre_hook(self._keep(name), prepend=True))

    def _at_module(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._open:
            self._kept["arguments"] = args, kwargs

    def on_attention(self, call: AttentionCall) -> None:
        """Keep the call until the branch's last projection."""
        if self._open:
            self._kept["call"] = call

    def _finish(self, entering_last: Tensor) -> AttentionSeen:
        kept = self._kept
        args, kwargs = kept["arguments"]
        names = ("query", "key", "value")
        return AttentionSeen(
            entering=hidden_input(args, kwargs),
            call=kept.get("call"),
            projected=tuple(kept[name] for name in names) if "query" in kept else None,
            positions=_positions(self._modules.module, args, kwargs),
            rest=kwargs,
            query_entering=kept.get("query_norm"),
            key_entering=kept.get("key_norm"),
            output=entering_last,
        )


def _positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """(cos, sin) of the rotary embedding, (B or 1, T, ·): an argument of the module, or its table (GPT-J)."""
    given = kwargs.get("position_embeddings")
    if given is None:
        given = next((value for value in args if type(value) is tuple and len(value) == 2), None)
    if given is not None and all(isinstance(value, Tensor) for value in given):
        cos, sin = given
        return cos, sin
    table, ids = getattr(module, "embed_positions", None), kwargs.get("position_ids")
    if not isinstance(table, Tensor) or ids is None:
        return None
    sin, cos = table.to(ids.device)[ids].repeat_interleave(2, -1).chunk(2, -1)
    return cos, sin
