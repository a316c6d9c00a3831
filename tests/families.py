"""A small random model of every supported family, built from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.device import DEVICE

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

EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
"""Eager: the grouped matrix product does not support float64."""

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
    "mixtral": _llama_like("mixtral", **EXPERTS),
    "qwen3_moe": _llama_like("qwen3_moe", head_dim=8, moe_intermediate_size=24, norm_topk_prob=False, **EXPERTS),
    "gpt_oss": _llama_like("gpt_oss", head_dim=8, sliding_window=4, swiglu_limit=0.5, **EXPERTS),
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
"""Number of sublayer steps of the three layers; not for OPT with the norm after the sum."""


def build(name: str, *, seed: int = 0) -> nn.Module:
    """The family's model in float32 and evaluation mode on `DEVICE`, with random norm scales."""
    torch.manual_seed(seed)
    model = BUILDERS[name]().eval()
    for path, parameter in model.named_parameters():
        if parameter.dim() == 1 and path.endswith("weight"):
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif parameter.dim() == 1:
            parameter.data = 0.1 * torch.randn_like(parameter)
        else:
            # Larger than the usual initialization, so that branches have curvature and the trace is above rounding.
            parameter.data = 0.15 * torch.randn_like(parameter)
    return model.to(DEVICE)


def inputs(name: str, *, sequences: int = 2, tokens: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch for the family's forward pass, with labels, on `DEVICE`."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        pixels = torch.randn(sequences, 3, 16, 16, generator=generator)
        return on_device({"pixel_values": pixels, "labels": torch.arange(sequences) % 3})
    ids = torch.randint(3, 64, (sequences, tokens), generator=generator)
    return on_device({"input_ids": ids, "labels": torch.arange(sequences) % 3 if name == "bert" else ids})


def vision_language(name: str, *, seed: int = 0) -> nn.Module:
    """A vision-language model like `build`: a vision tower of two layers and a language model of three."""
    torch.manual_seed(seed)
    model = VISION_LANGUAGE[name]().eval()
    for path, parameter in model.named_parameters():
        if parameter.dim() == 1 and path.endswith("weight"):
            parameter.data += 0.3 * torch.randn_like(parameter)
        else:
            parameter.data = 0.15 * torch.randn_like(parameter)
    return model.to(DEVICE)


def images_and_text(name: str, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two sequences of nine tokens, each with an image of four tokens, with labels; PaliGemma's image comes first."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (2, 9), generator=generator)
    first = 0 if name == "paligemma" else 2
    ids[:, first : first + 4] = IMAGE_TOKEN
    given = {"input_ids": ids, "labels": torch.where(ids == IMAGE_TOKEN, -100, ids)}
    if name == "qwen2_vl":
        patches = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator)
        of_image = (ids == IMAGE_TOKEN).int()
        given |= {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
        return on_device({**given, "mm_token_type_ids": of_image})
    shape = (2, 1, 3, 16, 16) if name == "smolvlm" else (2, 3, 16, 16)
    given["pixel_values"] = torch.randn(shape, generator=generator)
    if name == "paligemma":
        given["token_type_ids"] = torch.ones_like(ids)  # 1 for the answer; attention to the rest is bidirectional
        given["token_type_ids"][:, :6] = 0
    if name == "gemma3":
        given["token_type_ids"] = (ids == IMAGE_TOKEN).long()
    return on_device(given)


def on_device(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on `DEVICE`; a repeated tensor stays one object."""
    moved = {id(value): value.to(DEVICE) for value in given.values()}
    return {key: moved[id(value)] for key, value in given.items()}


IMAGE_TOKEN = 63
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**GROUPED, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**VISION, image_size=16, patch_size=8)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config)


def _qwen2_vl() -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    text = {**TEXT, "rope_parameters": rotary}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN)
    return Qwen2VLForConditionalGeneration(config)


def _paligemma() -> nn.Module:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    text = {"model_type": "gemma", "head_dim": 8, **TEXT}
    vision = {"model_type": "siglip_vision_model", **VISION, "image_size": 16, "patch_size": 8}
    config = PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN, projection_dim=32)
    return PaliGemmaForConditionalGeneration(config)


def _gemma3() -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"model_type": "siglip_vision_model", **VISION, "image_size": 16, "patch_size": 4}
    config = Gemma3Config(
        text_config={"head_dim": 8, **TEXT},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
    )
    return Gemma3ForConditionalGeneration(config)


def _smolvlm() -> nn.Module:
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

    vision = {**VISION, "image_size": 16, "patch_size": 4}
    config = SmolVLMConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE_TOKEN, scale_factor=2
    )
    return SmolVLMForConditionalGeneration(config)


VISION_LANGUAGE: dict[str, Callable[[], nn.Module]] = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
    "smolvlm": _smolvlm,
}
