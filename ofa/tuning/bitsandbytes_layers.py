"""Four-bit layers of bitsandbytes on a CPU, which have no gradient any more once they were run without one.

Where the processor has AVX512-BF16, such a layer packs its weights for inference in the first forward pass in
evaluation mode whose input needs no gradient, and from then on its output has none either, in training mode as well.
Whoever trains around the layer is not told: the norm scales in front of it stay as they are.
"""

from __future__ import annotations

from torch import nn

from ofa.errors import InputError

_PACKS = "support_avx512bf16_for_cpu"
"""The attribute of a layer by which it decides; the layers of other libraries do not have it."""


class TrainableLayers:
    """Keeps the four-bit layers of a model from packing themselves until it is removed."""

    def __init__(self, model: nn.Module) -> None:
        """Nothing is changed where a layer is packed already.

        Raises:
            InputError: it is. (Its own way back, bitsandbytes 0.50, leaves the scales of its blocks in another order.)
        """
        packed = (path for path, module in model.named_modules() if _is_packed(module))
        if path := next(packed, None):
            raise InputError(
                f"the 4-bit layer {path} was packed for inference when the model was run without gradients, and has "
                "none any more; load the model again and call tune_norms before it is run"
            )
        self._layers = [module for module in model.modules() if getattr(module, _PACKS, False)]
        for layer in self._layers:
            setattr(layer, _PACKS, False)

    def remove(self) -> None:
        """Let them pack their weights again; a second time does nothing."""
        for layer in self._layers:
            setattr(layer, _PACKS, True)
        self._layers = []


def _is_packed(layer: nn.Module) -> bool:
    return bool(getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False))
