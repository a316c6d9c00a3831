"""Reuse the keys and values of a common prefix: logits of batches whose sequences all start with the same tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ofa.errors import InputError
from ofa.evaluation.encoding import collate
from ofa.models.introspection import accepted_arguments, model_window
from ofa.models.types import CausalLM

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedConfig

Intervention = Callable[[Tensor], AbstractContextManager[None]]
"""From the column (B,), int64, of each prompt's last token in the input to a context manager around the forward."""

_NEEDED_TO_CONTINUE = {"past_key_values", "position_ids", "use_cache"}
_ROTATIONS_THAT_DEPEND_ON_LENGTH = {"dynamic", "longrope"}


class PrefixCache:
    """A causal model after a fixed prefix (which may be empty), such as the demonstrations of in-context learning.

    The constructor computes the prefix's keys and values once, with the current weights; every batch reads the same
    copy. If the model's cache cannot be continued from outside (`reuses_cache` is False), the prefix is put in front of
    every sequence instead, with equal results. The caller sets eval mode and turns gradients off.

    With `kept`, the whole prefix is computed, and then only the keys and values at these positions stay. Later tokens
    keep the positions they have after the whole prefix, except with learned positions, which continue after the kept
    ones. A sliding window counts only the kept positions. `intervention` wraps every forward that has prompts in it,
    but not the prefix's own.

    Raises:
        InputError: only a part of the prefix is kept, and the model's cache cannot be continued.
    """

    def __init__(
        self,
        model: CausalLM,
        prefix: Sequence[int],
        pad_id: int,
        *,
        kept: Sequence[int] | None = None,
        intervention: Intervention | None = None,
    ) -> None:
        self.model = model
        self.prefix = list(prefix)
        self.pad_id = pad_id
        self.kept = list(range(len(self.prefix)) if kept is None else kept)
        self._intervention = intervention
        self._accepted = accepted_arguments(model)
        layers = _cache_layer_names(model) if self._accepted >= _NEEDED_TO_CONTINUE else set()
        self.reuses_cache = bool(layers) and layers <= {"DynamicLayer", "DynamicSlidingWindowLayer"}
        # A sliding window counts cache slots, so the padding between a prompt and its word would fill it.
        self._continues_after_padding = layers == {"DynamicLayer"}
        if len(self.kept) < len(self.prefix) and not self.reuses_cache:
            raise InputError(
                f"a {model.config.model_type} model cannot continue from a part of its cache, which this method needs: "
                "choose another method, or another model"
            )
        self._start = len(self.kept if _learns_positions(model) else self.prefix)
        self._layers = self._prefix_layers() if self.prefix and self.reuses_cache else []

    @property
    def cached_bytes(self) -> int:
        """Size in bytes of the cached keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers)

    def last_logits(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Logits (B, vocabulary), float32, at the last token of each sequence."""
        last = torch.tensor([[len(sequence) - 1] for sequence in sequences])
        return self._logits_at(sequences, last)[:, 0]

    def completion_log_likelihoods(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> Tensor:
        """Log-likelihoods (B,), float32, of all tokens of each completion after its own prompt."""
        longest = max(len(completion) for completion in completions)
        positions = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            steps = torch.arange(longest).clamp(max=len(completion) - 1)
            positions[row] = len(prompt) - 1 + steps
        sequences = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        logits = self._logits_at(sequences, positions)
        targets, real = (part.to(logits.device) for part in collate(completions, 0))
        return (_log_probabilities_of(logits, targets) * real).sum(1)

    def word_log_likelihoods(self, prompts: Sequence[Sequence[int]], words: Sequence[Sequence[int]]) -> Tensor:
        """Log-likelihoods (B, number of words), float32, of every word after every prompt; prompts are run once."""
        if not self._continues_after_padding:
            scores = [self.completion_log_likelihoods(prompts, [word] * len(prompts)) for word in words]
            return torch.stack(scores, dim=1)
        cache = _cache_from(self._layers, len(prompts))
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        first = self._logits_at(prompts, lengths[:, None] - 1, cache)[:, 0].log_softmax(-1)
        _, mask = collate(prompts, self.pad_id)
        columns = []
        for word in words:
            score = first[:, word[0]]
            columns.append(score if len(word) == 1 else score + self._rest_of_word(cache, mask, lengths, word))
        return torch.stack(columns, dim=1)

    def _rest_of_word(self, cache: DynamicCache, mask: Tensor, lengths: Tensor, word: Sequence[int]) -> Tensor:
        read, targets = (torch.tensor(part).expand(len(lengths), -1) for part in (word[:-1], word[1:]))
        positions = self._start + lengths[:, None] + torch.arange(read.shape[1])
        mask = self._with_prefix(torch.cat([mask, torch.ones_like(read)], dim=1))
        grown = _cache_from(cache.layers, len(lengths))
        logits = self._run(read, mask, positions, torch.arange(read.shape[1]), grown).float()
        return _log_probabilities_of(logits, targets.to(logits.device)).sum(1)

    def _logits_at(
        self, sequences: Sequence[Sequence[int]], positions: Tensor, cache: DynamicCache | None = None
    ) -> Tensor:
        """Logits (B, K, vocabulary), float32, at `positions` (B, K) of the sequences, counted from the prefix's end.

        The first position of a row is the last token of its prompt.
        """
        if self.prefix and not self.reuses_cache:
            sequences = [[*self.prefix, *sequence] for sequence in sequences]
            positions = positions + len(self.prefix)
        if cache is None and self._layers:
            cache = _cache_from(self._layers, len(sequences))
        input_ids, mask = collate(sequences, self.pad_id)
        if cache is not None:
            mask = self._with_prefix(mask)
        position_ids = (self._start + torch.arange(input_ids.shape[1])).expand_as(input_ids)
        read, places = positions.unique(return_inverse=True)
        with nullcontext() if self._intervention is None else self._intervention(positions[:, 0]):
            logits = self._run(input_ids, mask, position_ids, read, cache)
        rows = torch.arange(len(sequences))[:, None]
        return logits[rows.to(logits.device), places.to(logits.device)].float()

    def _run(
        self, input_ids: Tensor, mask: Tensor, position_ids: Tensor, read: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        """Logits (B, len(read), vocabulary); appends the input to `cache` if there is one."""
        device = next(self.model.parameters()).device
        arguments: dict[str, Any] = {}
        if cache is not None:
            arguments = {"past_key_values": cache, "position_ids": position_ids.to(device), "use_cache": True}
        elif "use_cache" in self._accepted:
            arguments = {"use_cache": False}
        arguments |= {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}
        if "logits_to_keep" in self._accepted:
            return self.model(**arguments, logits_to_keep=read.to(device)).logits
        # Index from the end: a prompt-tuned model puts its virtual tokens in front.
        logits = self.model(**arguments).logits[:, -input_ids.shape[1] :]
        return logits[:, read.to(logits.device)]

    def _prefix_layers(self) -> list[Any]:
        cache = _cache_from([], 1)
        ids = torch.tensor([self.prefix])
        positions = torch.arange(ids.shape[1])[None]
        self._run(ids, torch.ones_like(ids), positions, positions[0, -1:], cache)
        if len(self.kept) < len(self.prefix):
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, self.kept], layer.values[:, :, self.kept]
        return cache.layers

    def _with_prefix(self, mask: Tensor) -> Tensor:
        return torch.cat([mask.new_ones(len(mask), len(self.kept)), mask], dim=1)


def _cache_from(layers: Sequence[Any], batch: int) -> DynamicCache:
    """A cache that starts with `layers`, expanded to `batch` rows."""
    from transformers import DynamicCache

    # Without a config, sliding layers keep all tokens too; the attention mask limits what they see.
    cache = DynamicCache()
    for layer in layers:
        # Appending concatenates into a new tensor, so the shared keys and values are not modified.
        grown = copy.copy(layer)
        grown.keys = layer.keys.expand(batch, -1, -1, -1)
        grown.values = layer.values.expand(batch, -1, -1, -1)
        cache.layers.append(grown)
    return cache


def _log_probabilities_of(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def _cache_layer_names(model: CausalLM) -> set[str]:
    """Class names of the layers of the model's own cache; empty if a cached prefix cannot be continued."""
    from transformers import DynamicCache

    config = model.config.get_text_config()
    own_state = getattr(model, "_is_stateful", False) or config.is_encoder_decoder
    if own_state or getattr(config, "num_kv_shared_layers", 0) or _rotates_by_length(config):
        return set()
    cache = DynamicCache(config=config)
    return {type(layer).__name__ for layer in cache.layers}


def _learns_positions(model: CausalLM) -> bool:
    """True if the model has a learned embedding of positions."""
    window, tokens = model_window(model), model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    return window is not None and any(table.num_embeddings >= window for table in tables)


def _rotates_by_length(config: PreTrainedConfig) -> bool:
    parameters = getattr(config, "rope_parameters", None) or {}
    # Models with several layer types have one set of parameters per type.
    sets = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return any(one.get("rope_type") in _ROTATIONS_THAT_DEPEND_ON_LENGTH for one in sets)
