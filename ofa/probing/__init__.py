"""Analyze a model layer by layer: label accuracy and loss, step ratio, sharpness."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ofa._lazy import on_first_use

if TYPE_CHECKING:
    from ofa.probing.layerwise import probe as probe

__all__, __getattr__, __dir__ = on_first_use(
    __name__,
    {
        "probe": "ofa.probing.layerwise",
    },
)
