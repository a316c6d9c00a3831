"""Hooks that collect what goes on inside a branch, between its entry and its last projection.

A tap is silent unless it is open. At the last projection it hands everything to its owner, who may put further rows
behind the real ones, and takes them out again behind the projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ofa.closed_form import interface
from ofa.closed_form.interface import Attending, Watcher
from ofa.closed_form.parts import AttentionParts, MlpParts
from ofa.module_io import hidden_input


@dataclass(frozen=True)
class MlpSeen:
    """Of one MLP: its input, its pre-activations, and what goes into the last projection."""

    entering: Tensor
    gate: Tensor
    up: Tensor | None
    hidden: Tensor


@dataclass(frozen=True)
class AttentionSeen:
    """Of one attention: its input, what its attention function saw, and what goes into the last projection.

    `attending` is None where the attention function cannot be watched; `projected` are the outputs of the query, key
    and value projections then. `positions` is (cos, sin) as the module was given them, `rest` its other arguments.
    `query_entering` and `key_entering` are what the norms of the heads read.
    """

    entering: Tensor
    attending: Attending | None
    projected: tuple[Tensor, Tensor, Tensor] | None
    positions: tuple[Tensor, Tensor] | None
    rest: dict[str, Any]
    query_entering: Tensor | None
    key_entering: Tensor | None
    output: Tensor


Change = Callable[[Any], Tensor | None]


class Tap:
    """The hooks of one branch; `at_end(seen)` may return what to feed the last projection instead of its input."""

    def __init__(self, last: nn.Module, at_end: Change, behind: Callable[[Tensor], Tensor | None]) -> None:
        self.open = False
        self._at_end, self._behind = at_end, behind
        self._seen: dict[str, Any] = {}
        self.handles: list[RemovableHandle] = [
            last.register_forward_pre_hook(self._before_last),
            # First in line: where the branch ends here, its own hook must not see the rows behind the real ones.
            last.register_forward_hook(self._after_last, prepend=True),
        ]

    def start(self, entering: Tensor) -> None:
        """Collect, from here to the last projection."""
        self.open = True
        self._seen = {"entering": entering}

    def stop(self) -> None:
        """Fall silent and let go of everything."""
        if self.open:
            self.open, self._seen = False, {}

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any = None) -> None:
            if self.open:
                self._seen[name] = args[0] if output is None else output

        return hook

    def _before_last(self, module: nn.Module, args: Any) -> Any:
        if not self.open:
            return None
        changed = self._at_end(self._finish(args[0]))
        return None if changed is None else (changed, *args[1:])

    def _after_last(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self.open:
            return None
        self.stop()
        return self._behind(output)

    def _finish(self, entering_last: Tensor) -> Any:
        raise NotImplementedError


class MlpTap(Tap):
    """Collects an `MlpSeen`."""

    def __init__(self, parts: MlpParts, at_end: Change, behind: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__(parts.down.module, at_end, behind)
        self._parts = parts
        self.handles.append(parts.gate.module.register_forward_hook(self._keep("gate")))
        if parts.up is not None and not parts.fused:
            self.handles.append(parts.up.module.register_forward_hook(self._keep("up")))

    def _finish(self, entering_last: Tensor) -> MlpSeen:
        gate, up = self._seen["gate"], self._seen.get("up")
        if self._parts.fused:
            gate, up = gate.chunk(2, -1)
        return MlpSeen(self._seen["entering"], gate, up, entering_last)


class AttentionTap(Tap, Watcher):
    """Collects an `AttentionSeen`."""

    def __init__(self, parts: AttentionParts, at_end: Change, behind: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__(parts.output.module, at_end, behind)
        self._parts = parts
        module = parts.module
        # Also what makes the module's attention function show itself: see `Watcher`.
        self.handles.append(module.register_forward_pre_hook(self._at_module, with_kwargs=True))
        if not interface.supports(module):
            for name, linear in (("query", parts.query), ("key", parts.key), ("value", parts.value)):
                self.handles.append(linear.module.register_forward_hook(self._keep(name)))
        for name, norm in (("query_norm", parts.query_norm), ("key_norm", parts.key_norm)):
            if norm is not None:
                # First in line, as for the norms of branches: tuned norms of a bfloat16 model widen their input.
                self.handles.append(norm.register_forward_pre_hook(self._keep(name), prepend=True))

    def _at_module(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.open:
            self._seen["arguments"] = args, kwargs

    def attends(self, attending: Attending) -> None:
        """Kept until the branch's last projection."""
        if self.open:
            self._seen["attending"] = attending

    def _finish(self, entering_last: Tensor) -> AttentionSeen:
        seen = self._seen
        args, kwargs = seen["arguments"]
        names = ("query", "key", "value")
        return AttentionSeen(
            entering=hidden_input(args, kwargs),
            attending=seen.get("attending"),
            projected=tuple(seen[name] for name in names) if "query" in seen else None,
            positions=_positions(self._parts.module, args, kwargs),
            rest=kwargs,
            query_entering=seen.get("query_norm"),
            key_entering=seen.get("key_norm"),
            output=entering_last,
        )


def _positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """(cos, sin) of the rotary embedding, (B or 1, T, ·): handed to the module, or looked up by it (GPT-J)."""
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
