"""Task vector: the hidden state of one layer after the demonstrations replaces them (arXiv 2310.15916).

h_l is the output of decoder layer l at the last token of the demonstrations followed by one unlabelled training prompt.
At test, h_l overwrites the output of layer l at the last token of the bare prompt. Causal attention hides it from
earlier positions. Whole words attend to the overwritten state, but are not overwritten themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ofa import anatomy
from ofa.anatomy.module_io import hidden_output, replace_hidden_output
from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder
from ofa.evaluation.prefix_cache import PrefixCache
from ofa.evaluation.scorer import Scorer
from ofa.methods import Predictor
from ofa.methods.last_token import last_token_outputs
from ofa.models.introspection import hooked, model_window
from ofa.models.types import CausalLM, Tokenizer
from ofa.tasks.sampling import class_balanced
from ofa.tasks.task import Example, Task

VALIDATION_SIZE = 32
"""Maximum number of class-balanced training examples whose accuracy selects the layer."""


def fit(
    model: CausalLM,
    tokenizer: Tokenizer,
    task: Task,
    shots: Sequence[Example],
    seed: int,
    *,
    pool: Sequence[Example] = (),
) -> Predictor:
    """Record the states of all layers in one forward, and choose the layer with the best accuracy (lowest if tied).

    From the training examples in `pool` that are not shots, `seed` draws the unlabelled prompt and up to
    `VALIDATION_SIZE` others for validation. The notes have the number of validation examples, their accuracy for each
    layer, and the chosen layer, counted from 0.

    Raises:
        InputError: the pool without the shots has fewer than one example of every class and one more, the task has no
            labels, or the model's layers are not recognized.
    """
    if task.open_ended:
        raise InputError(f"task {task.name!r} has no labels, by which a task vector's layer is chosen: use icl instead")
    query, validation = draw(task, shots, pool, seed)
    layers = anatomy.find(model).layers
    states = last_token_outputs(model, layers, _prompt(model, tokenizer, task, shots, query))
    scorers = [
        TaskVectorScorer(model, tokenizer, task, layer=layer, state=state)
        for layer, state in zip(layers, states, strict=True)
    ]
    accuracies = [scorer.accuracy(validation) for scorer in scorers]
    best = accuracies.index(max(accuracies))
    return Predictor(
        scorers[best],
        contexts=("prompt",),
        stored_bytes=states[best].nbytes,
        notes={"layer": best, "validation_examples": len(validation), "validation_accuracies": accuracies},
    )


def draw(task: Task, shots: Sequence[Example], pool: Sequence[Example], seed: int) -> tuple[Example, list[Example]]:
    """The unlabelled prompt's example and the validation examples: different texts, none of them a shot's.

    Raises:
        InputError: there are too few.
    """
    texts = {shot.text for shot in shots}
    unseen = {e.text: e for e in pool if e.text not in texts and e.label in task.labels}
    missing = sorted(set(task.labels) - {example.label for example in unseen.values()})
    if missing or len(unseen) <= len(task.labels):
        lack = f'there is none of class "{missing[0]}"' if missing else f"there are only {len(unseen)}"
        raise InputError(
            "the layer of a task vector is chosen on training examples that are not shots, at least one of every class "
            f"and one more, but {lack}: give it more training examples as its pool"
        )
    examples = list(unseen.values())
    validation = class_balanced(examples, task.labels, min(VALIDATION_SIZE, len(examples) - 1), seed)
    rest = [example for example in examples if example not in validation]
    return class_balanced(rest, (), 1, seed)[0], list(validation)


class TaskVectorScorer(Scorer):
    """Scores labels with the output of one layer overwritten at the last token of every prompt."""

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, task: Task, *, layer: str, state: Tensor) -> None:
        super().__init__(model, tokenizer, task)
        self._layer = model.get_submodule(layer)
        self._state = state

    def shared_prefix(self, demonstrations: Sequence[int]) -> PrefixCache:
        """The prefix cache with an intervention that overwrites the state."""
        return PrefixCache(self.model, demonstrations, self.encoder.pad_id, intervention=self._overwriting)

    def _overwriting(self, columns: Tensor) -> AbstractContextManager[None]:
        def overwrite(module: nn.Module, args: object, output: object) -> object:
            hidden = hidden_output(output).clone()
            rows = torch.arange(len(hidden), device=hidden.device)
            hidden[rows, columns.to(hidden.device)] = self._state
            return replace_hidden_output(output, hidden, lambda other: other)

        return hooked([self._layer], overwrite)


def _prompt(model: CausalLM, tokenizer: Tokenizer, task: Task, shots: Sequence[Example], query: Example) -> list[int]:
    encoder = Encoder(tokenizer, task, model_window(model))
    demonstrations = encoder.encode_demonstrations(shots, texts=[query.text])
    return [*demonstrations, *encoder.encode_prompt(query.text, demonstrations=demonstrations)]
