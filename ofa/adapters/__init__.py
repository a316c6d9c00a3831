"""Save, read, load and merge adapter folders: tuned norm scales, and what PEFT's other methods train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ofa._lazy import on_first_use

if TYPE_CHECKING:
    from ofa.adapters.read import Adapter as Adapter
    from ofa.adapters.read import read_adapter as read_adapter

__all__, __getattr__, __dir__ = on_first_use(__name__, {"ofa.adapters.read": "Adapter read_adapter"})
