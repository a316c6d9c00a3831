"""Tasks and small models whose label words collide, are open-ended, or differ by less than rounding."""

from __future__ import annotations

import torch

from ofa.tasks.task import Task
from tests.device import DEVICE

TASK = Task(name="mood", template="Review: {text}\nSentiment:", labels=("negative", "positive"))
# In the tiny tokenizer no label of this task is a word of its own: all begin with the token of a blank and a letter,
# and the tokens of one begin those of another.
COLLIDING = Task(name="colliding", template="Review: {text}\nSentiment:", labels=("xab", "xabcd", "y", "xq"))
OPEN = Task(name="open", template="{text}\nAnswer:")

# The models below compute in float64, so that batch, padding and cache change nothing above 1e-12. There remains the
# rounding of the logits to float32 (2^-24 of a logit below 32, 2e-6) and a log-softmax in float32, a few times as much.
ROUNDING = 2e-5


def sharpened(model):
    """Float64, and weights ten times as large as at the start, without which a random model's scores hardly differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return model.double().eval().to(DEVICE)


def build(family, vocab_size):
    import transformers as hf

    shape = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    rotary = {**shape, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    makers = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**rotary)),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=256)
        ),
        "opt": lambda: hf.OPTForCausalLM(
            hf.OPTConfig(**shape, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=256)
        ),
        "sliding mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**rotary, sliding_window=6)),
        "dynamic llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**rotary, rope_parameters=dynamic)),
        "bloom": lambda: hf.BloomForCausalLM(
            hf.BloomConfig(vocab_size=vocab_size, hidden_size=32, n_layer=2, n_head=4)
        ),
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return sharpened(makers[family]())
