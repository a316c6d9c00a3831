"""GGUF files of the tests' models, as llama.cpp's converter would write them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np


@dataclass(frozen=True)
class Layout:
    """The architecture of a family's files, the names of its norms, and what the converter adds to their weights.

    From files that `convert_hf_to_gguf.py` wrote of these models on 2026-11-29; gpt_neox and gemma3 from its source,
    since it does not run on tiny ones.
    """

    architecture: str
    norms: dict[str, str]
    added: float = 0.0

    def name(self, path: str) -> str:
        """The tensor name of a norm's weight or bias, from its path in the model."""
        module, _, kind = path.rpartition(".")
        layer = next((part for part in module.split(".") if part.isdigit()), "")
        return f"{self.norms[module.replace(f'.{layer}.', '.N.')].replace('N', layer)}.{kind}"


_LLAMA = {
    "model.layers.N.input_layernorm": "blk.N.attn_norm",
    "model.layers.N.post_attention_layernorm": "blk.N.ffn_norm",
    "model.norm": "output_norm",
}
_HEADS = {
    "model.layers.N.self_attn.q_norm": "blk.N.attn_q_norm",
    "model.layers.N.self_attn.k_norm": "blk.N.attn_k_norm",
}
_SANDWICH = _LLAMA | {
    "model.layers.N.post_attention_layernorm": "blk.N.post_attention_norm",
    "model.layers.N.pre_feedforward_layernorm": "blk.N.ffn_norm",
    "model.layers.N.post_feedforward_layernorm": "blk.N.post_ffw_norm",
}
_FALCON = {"transformer.h.N.input_layernorm": "blk.N.attn_norm", "transformer.ln_f": "output_norm"}

LAYOUTS = {
    "llama": Layout("llama", _LLAMA),
    "mistral": Layout("llama", _LLAMA),
    "mixtral": Layout("llama", _LLAMA),
    "qwen2": Layout("qwen2", _LLAMA),
    "qwen3": Layout("qwen3", _LLAMA | _HEADS),
    "qwen3_moe": Layout("qwen3moe", _LLAMA | _HEADS),
    "smollm3": Layout("smollm3", _LLAMA),
    "granite": Layout("granite", _LLAMA),
    "gemma": Layout("gemma", _LLAMA, added=1.0),
    "gemma2": Layout("gemma2", _SANDWICH, added=1.0),
    "gemma3": Layout("gemma3", _SANDWICH | _HEADS, added=1.0),
    "phi3": Layout("phi3", _LLAMA),
    "olmo2": Layout(
        "olmo2",
        _HEADS
        | {
            "model.layers.N.post_attention_layernorm": "blk.N.post_attention_norm",
            "model.layers.N.post_feedforward_layernorm": "blk.N.post_ffw_norm",
            "model.norm": "output_norm",
        },
    ),
    "cohere": Layout("command-r", _LLAMA),
    "phi": Layout("phi2", _LLAMA | {"model.final_layernorm": "output_norm"}),
    "gpt2": Layout(
        "gpt2",
        {
            "transformer.h.N.ln_1": "blk.N.attn_norm",
            "transformer.h.N.ln_2": "blk.N.ffn_norm",
            "transformer.ln_f": "output_norm",
        },
    ),
    "gpt_neox": Layout(
        "gptneox",
        {
            "gpt_neox.layers.N.input_layernorm": "blk.N.attn_norm",
            "gpt_neox.layers.N.post_attention_layernorm": "blk.N.ffn_norm",
            "gpt_neox.final_layer_norm": "output_norm",
        },
    ),
    "gpt_oss": Layout("gpt-oss", _LLAMA | {"model.layers.N.post_attention_layernorm": "blk.N.post_attention_norm"}),
    "falcon": Layout("falcon", _FALCON),
    "falcon_two_norms": Layout(
        "falcon",
        _FALCON | {"transformer.h.N.ln_attn": "blk.N.attn_norm_2", "transformer.h.N.ln_mlp": "blk.N.attn_norm"},
    ),
    "bert": Layout(
        "bert",
        {
            "bert.embeddings.LayerNorm": "token_embd_norm",
            "bert.encoder.layer.N.attention.output.LayerNorm": "blk.N.attn_output_norm",
            "bert.encoder.layer.N.output.LayerNorm": "blk.N.layer_output_norm",
        },
    ),
}


def write_gguf(file: Path, architecture: str, tensors: dict[str, np.ndarray[Any, Any]], **fields: Any) -> Path:
    """A GGUF file of these tensors; `fields` are named without the architecture's prefix, with `__` for a dot."""
    writer = gguf.GGUFWriter(file, architecture)
    for name, value in fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{architecture}.{name.replace('__', '.')}", value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
