"""Four-bit layers of bitsandbytes on a CPU, which have no gradient any more once they were run without one.

Where the processor has AVX512-BF16, such a layer packs its weights for inference in the first forward pass in
evaluation mode whose input needs no gradient, and from then on its output has none either, in training mode as well.
Whoever trains around the layer is not told: the norm scales in front of it stay as they are.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_PACKS = "support_avx512bf16_for_cpu"
"""The attribute of a layer by which it decides; the layers of other libraries do not have it."""


class TrainableLayers:
    """Keeps the four-bit layers of a model differentiable until it is removed; those already packed are unpacked."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if getattr(module, _PACKS, False)]
        for layer in self._layers:
            _unpack(layer)
            setattr(layer, _PACKS, False)

    def remove(self) -> None:
        """Let them pack their weights again; a second time does nothing."""
        for layer in self._layers:
            setattr(layer, _PACKS, True)
        self._layers = []


def _unpack(layer: nn.Module) -> None:
    weight: Any = layer.weight
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        # What bitsandbytes does itself with packed weights ahead of saving them, and its only public way to do it.
        layer.state_dict()
