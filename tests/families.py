"""A small random model of every supported family, built from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
GROUPED = {**SIZE, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}


def _causal(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def _llama_like(name: str, **extra: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import AutoConfig

        return _causal(AutoConfig.for_model(name, **{**GROUPED, "pad_token_id": 0, **extra}))

    return build


def _other(name: str, **fields: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import AutoConfig

        return _causal(
            AutoConfig.for_model(name, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **fields)
        )

    return build


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**SIZE, intermediate_size=48, max_position_embeddings=64, num_labels=3)
    return BertForSequenceClassification(config)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    )
    config.num_labels = 3
    return ViTForImageClassification(config)


GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
NEOX = {**SIZE, "intermediate_size": 48, "max_position_embeddings": 64}
NEOX.pop("vocab_size")
FALCON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
OPT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama_like("llama"),
    "mistral": _llama_like("mistral"),
    "qwen2": _llama_like("qwen2"),
    "qwen3": _llama_like("qwen3", head_dim=8),
    "smollm3": _llama_like("smollm3"),
    "granite": _llama_like("granite", residual_multiplier=0.5),
    "gemma": _llama_like("gemma", head_dim=8),
    "gemma2": _llama_like("gemma2", head_dim=8),
    "gemma3": _llama_like("gemma3_text", head_dim=8),
    "phi3": _llama_like("phi3"),
    "olmo2": _llama_like("olmo2"),
    "cohere": _llama_like("cohere"),
    "phi": _llama_like("phi"),
    "gpt2": _other("gpt2", **GPT),
    "gptj": _other("gptj", rotary_dim=4, **GPT),
    "gpt_neox": _other("gpt_neox", **NEOX),
    "gpt_neox_sequential": _other("gpt_neox", use_parallel_residual=False, **NEOX),
    "opt": _other("opt", **OPT),
    "opt_post_norm": _other("opt", do_layer_norm_before=False, **OPT),
    "falcon": _other("falcon", new_decoder_architecture=False, parallel_attn=True, **FALCON),
    "falcon_alibi": _other("falcon", alibi=True, new_decoder_architecture=False, parallel_attn=True, **FALCON),
    "falcon_two_norms": _other("falcon", new_decoder_architecture=True, num_kv_heads=2, **FALCON),
    "falcon_sequential": _other("falcon", new_decoder_architecture=False, parallel_attn=False, **FALCON),
    "bert": _bert,
    "vit": _vit,
}

STEPS = dict.fromkeys(BUILDERS, 6) | dict.fromkeys(
    ("phi", "cohere", "gptj", "gpt_neox", "falcon", "falcon_alibi", "falcon_two_norms"), 3
)
"""Sublayer steps of the three layers; OPT with the norm after the sum has none."""


def build(name: str, *, seed: int = 0) -> nn.Module:
    """The family's model in float32 and evaluation mode, its norms moved away from 1 so that γ matters."""
    torch.manual_seed(seed)
    model = BUILDERS[name]().eval()
    for path, parameter in model.named_parameters():
        if parameter.dim() == 1 and path.endswith("weight"):
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif parameter.dim() == 1:
            parameter.data = 0.1 * torch.randn_like(parameter)
        else:
            # Larger than the usual initialization, so that branches bend and the trace is not lost in rounding.
            parameter.data = 0.15 * torch.randn_like(parameter)
    return model


def inputs(name: str, *, sequences: int = 2, tokens: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """Something for the family's forward pass, with labels."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        pixels = torch.randn(sequences, 3, 16, 16, generator=generator)
        return {"pixel_values": pixels, "labels": torch.arange(sequences) % 3}
    ids = torch.randint(3, 64, (sequences, tokens), generator=generator)
    return {"input_ids": ids, "labels": torch.arange(sequences) % 3 if name == "bert" else ids}
