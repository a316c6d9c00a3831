"""Save, read, load and merge adapter folders: tuned norm scales, and what PEFT's other methods train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ofa._lazy import on_first_use

if TYPE_CHECKING:
    from ofa.adapters.base_norms import fingerprints as fingerprints
    from ofa.adapters.gguf_norms import merge_gguf as merge_gguf
    from ofa.adapters.pool import AdapterPool as AdapterPool
    from ofa.adapters.read import Adapter as Adapter
    from ofa.adapters.read import read_adapter as read_adapter
    from ofa.adapters.save_and_load import load_adapter as load_adapter
    from ofa.adapters.save_and_load import merge as merge
    from ofa.adapters.save_and_load import save_adapter as save_adapter
    from ofa.adapters.write import versions as versions

__all__, __getattr__, __dir__ = on_first_use(
    __name__,
    {
        "ofa.adapters.gguf_norms": "merge_gguf",
        "ofa.adapters.pool": "AdapterPool",
        "ofa.adapters.read": "Adapter read_adapter",
        "ofa.adapters.base_norms": "fingerprints",
        "ofa.adapters.save_and_load": "load_adapter merge save_adapter",
        "ofa.adapters.write": "versions",
    },
)
