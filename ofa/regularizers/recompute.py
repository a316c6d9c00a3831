"""Activation checkpointing runs a layer again; the second run belongs to the pass of the first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.weak import WeakTensorKeyDictionary

from ofa.regularizers.measured_pass import MeasuredPass


class RecomputeTracker:
    """The pass that a decoder layer is being measured for; shared by the branches of the layer.

    Non-reentrant activation checkpointing runs a layer again in the backward pass, maybe after other forward passes,
    and must meet the probes and the mask of its own forward. The stream that enters the layer tells which pass it
    belongs to: it is the very tensor that the layer was first called with, or, where checkpoints are offloaded, a copy
    of it that comes from the same place in the graph. Any other call of a layer from outside a forward pass of the
    model is not measured.
    """

    def __init__(self) -> None:
        self.current: MeasuredPass | None = None
        self._again: MeasuredPass | None = None
        self._passes = WeakTensorKeyDictionary()
        """By stream, for streams that are constants."""
        self._node: Node | None = None

    def begin(self, current: MeasuredPass, again: MeasuredPass) -> None:
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

    def _remember(self, stream: Tensor, again: MeasuredPass) -> None:
        if not stream.requires_grad:
            self._passes[stream] = again
            return
        node, output = _origin(stream)
        node.metadata[self, output] = again  # type: ignore[index]
        self._node = node  # nothing else holds that of a leaf until something is computed from it

    def _recall(self, stream: Tensor) -> MeasuredPass | None:
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
