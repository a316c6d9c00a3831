"""Soft prompt: one trained vector in front of the tokens' embeddings (arXiv 2104.08691), by PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ofa.errors import InputError
from ofa.evaluation.prefix_cache import PrefixCache
from ofa.evaluation.scorer import Scorer
from ofa.methods import Predictor
from ofa.methods.peft_training import fit_adapter
from ofa.models.introspection import hooked
from ofa.models.types import CausalLM, Tokenizer
from ofa.tasks.task import Example, Task

if TYPE_CHECKING:
    from peft import PeftConfig

SETTINGS = {"learning_rate": 0.1, "epochs": 50}
"""Defaults that differ from `TrainingConfig`."""


def fit(
    model: CausalLM, tokenizer: Tokenizer, task: Task, shots: Sequence[Example], seed: int, **options: Any
) -> Predictor:
    """Train one vector (d,), initialized with the embedding of a token drawn uniformly from the vocabulary by `seed`.

    The vector comes first, then demonstrations, then the prompt; labels are scored at the prompt's last token.
    `options` as for `fit_adapter`.

    Raises:
        InputError: the task is open-ended; see also `fit_adapter`.
    """
    if task.open_ended:
        # PEFT's generation ignores positions, so padding would shift the shorter prompts of a batch.
        raise InputError(f"task {task.name!r} has no labels, and soft-prompt only scores labels; choose another method")
    own = {"method": "soft-prompt", "scored_by": SoftPromptScorer, "notes": {"extra_tokens": 1}}
    return fit_adapter(model, tokenizer, task, shots, seed, config_for, **{**SETTINGS, **options, **own})


class SoftPromptScorer(Scorer):
    """Scores labels after the vector, whose keys and values are cached together with the demonstrations'."""

    def shared_prefix(self, demonstrations: Sequence[int]) -> PrefixCache:
        """The cache of the vector and the demonstrations on the base model; on PEFT's if it cannot be continued."""
        base = self.model.get_base_model()
        vectors = self.model.get_prompt(1)
        places = [self.encoder.pad_id] * vectors.shape[1]
        with _embedded_first(base.get_input_embeddings(), vectors):
            shared = PrefixCache(base, [*places, *demonstrations], self.encoder.pad_id)
        return shared if shared.reuses_cache else super().shared_prefix(demonstrations)


def config_for(model: CausalLM) -> PeftConfig:
    """PEFT's configuration of the vector for a model."""
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1, prompt_tuning_init="SAMPLE_VOCAB")


def _embedded_first(embedding: nn.Module, vectors: Tensor) -> AbstractContextManager[None]:
    """Replace the embeddings of the first K tokens by `vectors` (1, K, d)."""

    def replace(module: nn.Module, args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, : vectors.shape[1]] = vectors.to(output.dtype)
        return output

    return hooked([embedding], replace)
