"""The two regularizers of OFA for any training loop: attach, measure, add the penalty, detach."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ofa._lazy import on_first_use

if TYPE_CHECKING:
    from ofa.regularizers.attach import Regularizers as Regularizers
    from ofa.regularizers.attach import attached as attached
    from ofa.regularizers.attach import fused_regularizers as fused_regularizers
    from ofa.regularizers.options import CONVENTIONS as CONVENTIONS
    from ofa.regularizers.options import RegularizerOptions as RegularizerOptions

__all__, __getattr__, __dir__ = on_first_use(
    __name__,
    {
        "ofa.regularizers.attach": "Regularizers attached fused_regularizers",
        "ofa.regularizers.options": "CONVENTIONS RegularizerOptions",
    },
)
