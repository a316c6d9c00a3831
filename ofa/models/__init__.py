"""Load a causal language model and its tokenizer: a hub id, a folder, a GGUF file, or the embedded default."""

from ofa.models.load import (
    LoadedModel,
    LoadedTokenizer,
    Source,
    check_source,
    load_model,
    load_tokenizer,
    refuse_encoder,
)

__all__ = [
    "LoadedModel",
    "LoadedTokenizer",
    "Source",
    "check_source",
    "load_model",
    "load_tokenizer",
    "refuse_encoder",
]
