"""Finds the pass that a layer recomputed by activation checkpointing belongs to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.weak import WeakTensorKeyDictionary

from ofa.regularizers.measured_pass import MeasuredPass


class RecomputeTracker:
    """The pass that a decoder layer is being measured for; shared by the branches of the layer.

    Non-reentrant activation checkpointing recomputes a layer in the backward pass, maybe after other forward passes,
    and needs the probes and the mask of its own forward pass. The layer's input identifies it: it is the same tensor
    as in the forward pass, or, with offloaded checkpoints, a copy with the same place in the graph. Other calls of a
    layer outside a forward pass of the model are not measured.
    """

    def __init__(self) -> None:
        self.current: MeasuredPass | None = None
        self._again: MeasuredPass | None = None
        self._passes = WeakTensorKeyDictionary()
        """By stream, for streams without a gradient."""
        self._node: Node | None = None

    def begin(self, current: MeasuredPass, again: MeasuredPass) -> None:
        """A measured forward pass of the model starts; `again` is the pass for recomputations of this layer."""
        self.current, self._again = current, again

    def end(self) -> None:
        """No forward pass of the model is being measured."""
        self.current = self._again = self._node = None

    def enter(self, stream: Tensor) -> None:
        """Remember the pass of the layer's input, or in a recomputation, find it."""
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
        self._node = node  # keeps a leaf's node alive until something is computed from it

    def _recall(self, stream: Tensor) -> MeasuredPass | None:
        if not stream.requires_grad:
            return self._passes.get(stream)
        node, output = _origin(stream)
        return node.metadata.get((self, output))  # type: ignore[attr-defined]


def _origin(stream: Tensor) -> tuple[Node, int]:
    """The graph node that a tensor comes from, and its output index there.

    Skips FSDP2's node before a layer: PyTorch 2.11 makes a new one in every run of the layer.
    """
    edge = get_gradient_edge(stream)
    node, output = edge.node, edge.output_nr
    while node.name() == "RegisterPostBackwardFunctionBackward":
        following, output = node.next_functions[output]
        assert following is not None
        node = following
    return node, output
