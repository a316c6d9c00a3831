"""Load a causal language model and its tokenizer: a hub id, a folder, a GGUF file, or the embedded default."""

from ofa.models.load import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]
