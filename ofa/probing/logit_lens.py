"""Logit lens: read hidden states after every decoder layer, and decode them with the model's own final modules.

The modules after the last layer (final norm, head, logit scale in Granite and Cohere, soft-cap in Gemma 2) treat each
token separately. So the lens does not rebuild them: it runs the model on one token and replaces the output of its last
layer by the hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ofa.anatomy.module_io import hidden_output, replace_hidden_output
from ofa.models.introspection import accepted_arguments, hooked
from ofa.models.types import CausalLM

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

_ROWS = 256
"""Hidden states decoded per forward: their logits over a vocabulary of 128,000 tokens take 130 MB."""


class LogitLens:
    """Reads hidden states after decoder layers and decodes them; hooks are attached only during a call.

    The caller sets eval mode and turns gradients off. `layers` are module paths, first to last.
    """

    def __init__(self, model: CausalLM, layers: Sequence[str]) -> None:
        self.model = model
        self._layers = [model.get_submodule(path) for path in layers]
        self._device = next(model.parameters()).device
        accepted = accepted_arguments(model)
        self._no_cache: dict[str, object] = {"use_cache": False} if "use_cache" in accepted else {}
        self._one_logit: dict[str, object] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def states(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Output of each layer at `positions` (B, K) of right-padded sequences (B, T): (L, B, K, d), the model's dtype.

        This is the residual stream: the final norm is not applied, not even to the last layer.
        """
        seen: list[Tensor] = []
        rows, places = torch.arange(len(input_ids))[:, None], positions

        def read(module: nn.Module, args: object, output: Any) -> None:
            # Index from the end: a prompt-tuned model puts its virtual tokens in front.
            hidden = hidden_output(output)[:, -input_ids.shape[1] :]
            seen.append(hidden[rows.to(hidden.device), places.to(hidden.device)].to(self._device))

        with hooked(self._layers, read):
            self._run(input_ids, attention_mask=attention_mask.to(self._device), **self._one_logit)
        return torch.stack(seen)

    def log_probabilities(self, states: Tensor, tokens: Sequence[int]) -> Tensor:
        """Log-probabilities (…, number of tokens), float32, of `tokens` in the whole vocabulary, for states (…, d)."""
        rows = states.reshape(-1, 1, states.shape[-1]).split(_ROWS)
        chosen = [self._decode(part).log_softmax(-1)[:, list(tokens)] for part in rows]
        return torch.cat(chosen).reshape(*states.shape[:-1], -1)

    def _decode(self, states: Tensor) -> Tensor:
        """Logits (rows, vocabulary), float32, of hidden states (rows, 1, d)."""

        def substitute(module: nn.Module, args: object, output: object) -> object:
            return replace_hidden_output(output, states.to(hidden_output(output).device), lambda tensor: tensor)

        with hooked(self._layers[-1:], substitute):
            output = self._run(torch.zeros(1, 1, dtype=torch.long))
        return output.logits.reshape(len(states), -1).float()

    def _run(self, input_ids: Tensor, **arguments: object) -> ModelOutput:
        return self.model(input_ids=input_ids.to(self._device), **self._no_cache, **arguments)
