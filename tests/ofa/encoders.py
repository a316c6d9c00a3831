"""Tiny random encoders with a tokenizer, saved as masked-word models: what hubs have, without a head."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "bos_token_id": 0,
    "cls_token_id": 0,
    "eos_token_id": 1,
    "sep_token_id": 1,
    "pad_token_id": 2,
}
KINDS = {
    "bert": SIZE,
    "roberta": SIZE,
    "deberta-v2": {**SIZE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "modernbert": {**SIZE, "local_attention": 8, "global_attn_every_n_layers": 2},
}


def save_encoder(kind: str, tokenizer: Path, folder: Path) -> Path:
    """A folder with an encoder of this kind; every text is put between <s> and </s>."""
    own = AutoTokenizer.from_pretrained(tokenizer)
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    own.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, vocab_size=len(own), **KINDS[kind]))
        for parameter in model.parameters():
            if parameter.dim() == 2:  # larger than the usual start, so that texts differ
                parameter.data = 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder
