"""Load a causal language model and its tokenizer: a hub id, a folder, a GGUF file, or the embedded default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ofa._lazy import on_first_use

if TYPE_CHECKING:
    from ofa.models.load import LoadedModel as LoadedModel
    from ofa.models.load import LoadedTokenizer as LoadedTokenizer
    from ofa.models.load import Source as Source
    from ofa.models.load import check_source as check_source
    from ofa.models.load import load_model as load_model
    from ofa.models.load import load_tokenizer as load_tokenizer
    from ofa.models.load import refuse_encoder as refuse_encoder

__all__, __getattr__, __dir__ = on_first_use(
    __name__,
    {
        "LoadedModel": "ofa.models.load",
        "LoadedTokenizer": "ofa.models.load",
        "Source": "ofa.models.load",
        "check_source": "ofa.models.load",
        "load_model": "ofa.models.load",
        "load_tokenizer": "ofa.models.load",
        "refuse_encoder": "ofa.models.load",
    },
)
