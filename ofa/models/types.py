"""The types of causal language models and tokenizers: those of transformers, without its import at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel as CausalLM
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    CausalLM = Tokenizer = Any

__all__ = ["CausalLM", "Tokenizer"]
