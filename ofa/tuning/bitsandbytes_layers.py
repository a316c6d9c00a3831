"""Keeps 4-bit layers of bitsandbytes differentiable on a CPU with AVX512-BF16.

There such a layer packs its weights for inference in the first evaluation-mode forward pass whose input needs no
gradient. Its output then never has a gradient again, not even in training mode, and the norm scales before it silently
stay as they are.
"""

from __future__ import annotations

from torch import nn

from ofa.errors import InputError

_PACKS = "support_avx512bf16_for_cpu"
"""The layer's attribute that enables packing; layers of other libraries do not have it."""


class TrainableLayers:
    """Keeps the 4-bit layers of a model from packing their weights, until removed."""

    def __init__(self, model: nn.Module) -> None:
        """Disable packing in every 4-bit layer.

        Raises:
            InputError: a layer is packed already; nothing is changed then. (bitsandbytes 0.50 can unpack it, but leaves
                the block scales in a different order.)
        """
        packed = (path for path, module in model.named_modules() if _is_packed(module))
        if path := next(packed, None):
            raise InputError(
                f"the 4-bit layer {path} was packed for inference when the model was run without gradients, so it "
                "passes no gradient on; load the model again and call tune_norms before running it"
            )
        self._layers = [module for module in model.modules() if getattr(module, _PACKS, False)]
        for layer in self._layers:
            setattr(layer, _PACKS, False)

    def remove(self) -> None:
        """Enable packing again; a second call does nothing."""
        for layer in self._layers:
            setattr(layer, _PACKS, True)
        self._layers = []


def _is_packed(layer: nn.Module) -> bool:
    return bool(getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False))
