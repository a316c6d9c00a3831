"""Classify texts by a frozen model's hidden state at the prompt's last token, for two baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ofa.errors import InputError
from ofa.evaluation.encoding import collate
from ofa.evaluation.scorer import Progress, Scorer
from ofa.methods import Predictor
from ofa.models.introspection import accepted_arguments, evaluating
from ofa.models.types import CausalLM, Tokenizer
from ofa.tasks.task import Example, Task

Classifier = Callable[[Tensor], Tensor]
"""Map hidden states (n, d) to log-probabilities of the labels (n, C)."""


def fit_classifier(
    model: CausalLM,
    tokenizer: Tokenizer,
    task: Task,
    shots: Sequence[Example],
    train: Callable[[Tensor, Tensor], tuple[Classifier, int]],
) -> Predictor:
    """Train a classifier of hidden states (n, d) with their classes (n,); `train` returns it and its number of weights.

    Raises:
        InputError: the task is open-ended, or a label has no shot.
    """
    if task.open_ended:
        raise InputError(f"task {task.name!r} has no labels to classify; choose another method")
    absent = next((label for label in task.labels if all(shot.label != label for shot in shots)), None)
    if absent is not None:
        raise InputError(f"no shot has the label {absent!r}, so a classifier cannot learn it; give one of every label")
    states = last_hidden_states(Scorer(model, tokenizer, task), [shot.text for shot in shots])
    classifier, weights = train(states, torch.tensor([task.labels.index(shot.label) for shot in shots]))
    scorer = HiddenStateScorer(model, tokenizer, task, classifier)
    return Predictor(scorer, trainable_parameters=weights, contexts=("prompt",), stored_bytes=4 * weights)


class HiddenStateScorer(Scorer):
    """Scores labels by a classifier of the hidden state at the last token of the prompt."""

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, task: Task, classifier: Classifier) -> None:
        super().__init__(model, tokenizer, task)
        self._classifier = classifier

    def log_probabilities(self, texts: Sequence[str], *, progress: Progress | None = None) -> Tensor:
        """Log-probabilities (n, number of labels) by the classifier; label words are not used."""
        return self._classifier(last_hidden_states(self, texts, progress))


def last_hidden_states(scorer: Scorer, texts: Sequence[str], progress: Progress | None = None) -> Tensor:
    """The input of the head, (n, d), float32, on the CPU, at the last token of each text's prompt.

    LoRA and IA3 in PEFT's wrapper count; its soft prompt, which is no part of the layers, does not.
    """
    prompts = scorer.encoder.encode_prompts(texts)
    model = scorer.model
    body = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
    device = next(scorer.model.parameters()).device
    extra = {"use_cache": False} if "use_cache" in accepted_arguments(body) else {}
    rows: dict[int, Tensor] = {}
    with evaluating(scorer.model):
        for batch in scorer.batches(prompts, progress):
            ids, mask = collate([prompts[index] for index in batch], scorer.encoder.pad_id)
            states = body(input_ids=ids.to(device), attention_mask=mask.to(device), **extra).last_hidden_state
            ends = mask.sum(1) - 1
            last = states[torch.arange(len(batch), device=states.device), ends.to(states.device)]
            rows |= dict(zip(batch, last.float().cpu(), strict=True))
    return torch.stack([rows[index] for index in range(len(prompts))])
