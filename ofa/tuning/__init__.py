"""Makes the norm scales trainable and freezes the rest; undoes both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ofa._lazy import on_first_use

if TYPE_CHECKING:
    from ofa.tuning.norms import base_parameters as base_parameters
    from ofa.tuning.norms import hold_norms as hold_norms
    from ofa.tuning.norms import restore_norms as restore_norms
    from ofa.tuning.norms import tune_norms as tune_norms

__all__, __getattr__, __dir__ = on_first_use(
    __name__,
    {
        "base_parameters": "ofa.tuning.norms",
        "hold_norms": "ofa.tuning.norms",
        "restore_norms": "ofa.tuning.norms",
        "tune_norms": "ofa.tuning.norms",
    },
)
