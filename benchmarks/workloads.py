"""Models, batches and variants of the benchmarks, and their training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ofa
from benchmarks.algorithm1 import PlainLoop

PLAIN, FUSED = "plain", "fused"
CPU = torch.device("cpu")


class Attached(Protocol):
    """What a variant attaches, by default regularizers."""

    def penalty(self) -> Tensor | None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Workload:
    """A Llama of a given shape with random weights, and the size of its batch."""

    name: str
    shape: tuple[tuple[str, int], ...]
    sequences: int
    tokens: int

    @property
    def label(self) -> str:
        """Model and batch in words."""
        return f"{self.name}, {self.sequences}x{self.tokens} tokens"

    def of(self, sequences: int, tokens: int) -> Workload:
        """The same model with another batch size."""
        return replace(self, sequences=sequences, tokens=tokens)

    def shortened(self, layers: int) -> Workload:
        """The model with fewer layers, and a vocabulary in proportion."""
        full = dict(self.shape)
        vocabulary = full["vocab_size"] * layers // full["num_hidden_layers"]
        return self.reshaped(f"{self.name}_{layers}_layers", num_hidden_layers=layers, vocab_size=vocabulary)

    def reshaped(self, name: str, **shape: int) -> Workload:
        """A model with another name and some other dimensions."""
        return replace(self, name=name, shape=tuple({**dict(self.shape), **shape}.items()))


SMOLLM2_135M = Workload(
    "smollm2_135m",
    (
        ("hidden_size", 576),
        ("num_hidden_layers", 30),
        ("num_attention_heads", 9),
        ("num_key_value_heads", 3),
        ("intermediate_size", 1536),
        ("vocab_size", 49152),
    ),
    sequences=10,
    tokens=48,
)

LLAMA2_7B_LAYERS = Workload(
    "llama2_7b_layers",
    (
        ("hidden_size", 4096),
        ("num_hidden_layers", 2),
        ("num_attention_heads", 32),
        ("num_key_value_heads", 32),
        ("intermediate_size", 11008),
        # Two layers represent 32: a full vocabulary would count 16 times too much.
        ("vocab_size", 32),
    ),
    sequences=1,
    tokens=128,
)

LLAMA3_8B_LAYERS = Workload(
    "llama3_8b_layers",
    (
        ("hidden_size", 4096),
        ("num_hidden_layers", 2),
        ("num_attention_heads", 32),
        ("num_key_value_heads", 8),
        ("intermediate_size", 14336),
        ("vocab_size", 32),
    ),
    sequences=10,
    tokens=128,
)

TINY = Workload(
    "tiny",
    (
        ("hidden_size", 32),
        ("num_hidden_layers", 2),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("intermediate_size", 48),
        ("vocab_size", 64),
    ),
    sequences=2,
    tokens=8,
)


Attach = Callable[[nn.Module, int], "Attached | None"]


def regularized(estimator: str, **options: Any) -> Attach:
    """The regularizers of this project, by default with both terms."""
    return lambda model, seed: ofa.fused_regularizers(model, estimator=estimator, seed=seed, **options)


class _FusedLayers:
    """Fused layers, and no regularizers."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        ofa.fuse_layers(model)

    def penalty(self) -> None:
        """No term of the loss."""

    def close(self) -> None:
        ofa.unfuse_layers(self._model)


def _loop(samples: int) -> Attach:
    return lambda model, seed: PlainLoop(model, samples=samples, granularity="sublayer", seed=seed)


VARIANTS: dict[str, Attach] = {
    PLAIN: lambda model, seed: None,
    FUSED: lambda model, seed: _FusedLayers(model),
    "step_ratio": regularized("auto", sharpness=0.0),
    "fused_step_ratio": regularized("auto", sharpness=0.0, fuse=True),
    "fused_exact": regularized("exact", fuse=True),
    "loop_n1": _loop(1),
    "loop_n4": _loop(4),
    "hutchinson_n1": regularized("hutchinson"),
    "hutchinson_n4": regularized("hutchinson", samples=4),
    "hutchinson_full_n1": regularized("hutchinson", gradient="full"),
    "hutchinson_full_n4": regularized("hutchinson", gradient="full", samples=4),
    "sharpness": regularized("exact", step_ratio=0.0),
    "exact": regularized("exact"),
    "exact_every4": regularized("exact", every=4),
    "exact_full": regularized("exact", gradient="full"),
}
"""Functions that attach a variant's regularizers: none, the paper's loop, or this project's."""


def build(workload: Workload, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model in evaluation mode; only its norm scales train, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**dict(workload.shape), tie_word_embeddings=True, attn_implementation="sdpa")
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    ofa.tune_norms(model)
    return model


def batch(workload: Workload, device: torch.device = CPU) -> Tensor:
    """Random token ids, (sequences, tokens)."""
    generator = torch.Generator().manual_seed(0)
    size = workload.sequences, workload.tokens
    return torch.randint(dict(workload.shape)["vocab_size"], size, generator=generator).to(device)


def loss(model: nn.Module, ids: Tensor, attached: Attached | None) -> Tensor:
    """Cross-entropy of one label token after the prompt, in nats, plus the penalty if there is one."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    value = F.cross_entropy(logits[:, -1], ids[:, 0])
    penalty = None if attached is None else attached.penalty()
    return value if penalty is None else value + penalty


def steps_of(variant: str) -> int:
    """Optimizer steps per round: four if the sharpness is measured in one of four."""
    return 4 if variant.endswith("every4") else 1


def move_scales(model: nn.Module) -> None:
    """Change the scales a little, as an optimizer does, which invalidates caches."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 1e-6)


def step(model: nn.Module, ids: Tensor, attached: Attached | None) -> None:
    """Forward and backward pass, without the previous step's gradients."""
    model.zero_grad(set_to_none=True)
    loss(model, ids, attached).backward()
