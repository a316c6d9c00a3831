"""Classify hidden states linearly: multinomial logistic regression on standardized features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_probe(features: Tensor, classes: Tensor, tested: Tensor) -> Tensor:
    """Log-probabilities (n, C), float32, on the CPU, of `tested` (n, d) by a classifier trained on `features` (m, d).

    Features are standardized by their mean and deviation in `features`. W and b minimize
    mean cross-entropy + ‖W‖²/(2m), a Gaussian prior of unit variance. The problem is convex, so the result does not
    depend on initialization; L-BFGS solves it in float64. `classes` (m,) holds every number from 0 to C − 1.
    """
    train, test = (part.detach().to("cpu", torch.float64) for part in (features, tested))
    mean, deviation = train.mean(0), train.std(0, correction=0)
    # A constant feature carries no information: set it to zero instead of dividing by zero.
    scale = torch.where(deviation > 0, 1 / deviation, 0.0)
    weight, bias = _fitted((train - mean) * scale, classes.to("cpu"))
    return F.linear((test - mean) * scale, weight, bias).log_softmax(1).float()


def _fitted(features: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    count = len(features)
    # The optimal weights lie in the span of the training features, a smaller space if there are few of them.
    basis, coordinates = torch.linalg.qr(features.T)
    coordinates = coordinates.T.contiguous()
    weight = torch.zeros(int(classes.max()) + 1, coordinates.shape[1], dtype=features.dtype, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=features.dtype, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-7, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(coordinates, weight, bias), classes) + weight.square().sum() / (2 * count)
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(objective)
    return weight.detach() @ basis.T, bias.detach()
