"""Linear probe: logistic regression on the last hidden states of the frozen model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ofa.methods import Predictor
from ofa.methods.hidden_states import Classifier, fit_classifier
from ofa.models.types import CausalLM, Tokenizer
from ofa.probing import linear_probe
from ofa.tasks.task import Example, Task


def fit(model: CausalLM, tokenizer: Tokenizer, task: Task, shots: Sequence[Example], seed: int) -> Predictor:
    """Fit `ofa.probing.linear_probe` to the shots: one weight per label and channel, and a bias.

    Raises:
        InputError: the task is open-ended, or a label has no shot.
    """
    return fit_classifier(model, tokenizer, task, shots, train)


def train(states: Tensor, classes: Tensor) -> tuple[Classifier, int]:
    """The logistic regression of these states (n, d) and its number of weights."""
    weights = (int(classes.max()) + 1) * (states.shape[1] + 1)
    return lambda tested: linear_probe.linear_probe(states, classes, tested), weights
