"""Class centroids: predict the label with the nearest mean hidden state (prototypical networks, arXiv 1703.05175)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ofa.methods import Predictor
from ofa.methods.hidden_states import Classifier, fit_classifier
from ofa.models.types import CausalLM, Tokenizer
from ofa.tasks.task import Example, Task


def fit(model: CausalLM, tokenizer: Tokenizer, task: Task, shots: Sequence[Example], seed: int) -> Predictor:
    """Compute the mean of the last hidden states of each label's shots.

    Raises:
        InputError: the task is open-ended, or a label has no shot.
    """
    return fit_classifier(model, tokenizer, task, shots, train)


def train(states: Tensor, classes: Tensor) -> tuple[Classifier, int]:
    """The classifier softmax_c(−‖z − μ_c‖² / 2s²) on standardized states z, and its number of weights.

    States are standardized as in `ofa.probing.linear_probe`. s² is the unbiased mean ‖z − μ_c‖² of the shots to their
    own centroids (factor n/(n − C)), so probabilities do not depend on the width. With one shot per class it is
    undefined; s² is then the mean of all shots' distances to their common mean.
    """
    deviation, mean = torch.std_mean(states, 0, correction=0)
    scale = torch.where(deviation > 0, 1 / deviation, 0.0)
    known = (states - mean) * scale
    count, size = len(classes), int(classes.max()) + 1
    centroids = torch.stack([known[classes == label].mean(0) for label in range(size)])
    within = (
        (known - centroids[classes]).square().sum(1).sum() / (count - size)
        if count > size
        else known.square().sum(1).mean()
    )

    def classify(tested: Tensor) -> Tensor:
        distances = torch.cdist((tested - mean) * scale, centroids).square()
        return (-distances / (2 * within)).log_softmax(1)

    return classify, centroids.numel()
