"""The linear probe solves the regularized logistic regression of its docstring to convergence."""

from __future__ import annotations

import pytest
import torch

from ofa.probing.linear_probe import linear_probe


def newton(features, classes, tested):
    """Oracle: binary logistic regression by Newton's method, for one weight vector.

    With two classes the best rows of W are w/2 and −w/2, so that ‖W‖²/(2m) is ‖w‖²/(4m).
    """
    mean, deviation = features.mean(0), features.std(0, correction=0)
    x, y = (features - mean) / deviation, classes.double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    ridge = torch.full((x.shape[1],), 1 / (2 * len(x)), dtype=x.dtype)
    ridge[-1] = 0
    w = torch.zeros(x.shape[1], dtype=x.dtype)
    for _ in range(50):
        p = (x @ w).sigmoid()
        gradient = x.T @ (p - y) / len(x) + ridge * w
        w = w - torch.linalg.solve((x.T * (p * (1 - p))) @ x / len(x) + torch.diag(ridge), gradient)
    margin = (tested - mean) / deviation @ w[:-1] + w[-1]
    return torch.stack([(-margin).sigmoid().log(), margin.sigmoid().log()], 1)


@pytest.mark.parametrize("count", [12, 80], ids=["fewer examples than features", "more examples than features"])
def test_two_classes_agree_with_newtons_method(count):
    """Tolerance: the solver stops where no derivative exceeds 1e-7, and the curvature is at least 1/(2m)."""
    generator = torch.Generator().manual_seed(0)
    features, tested = (torch.randn(n, 20, dtype=torch.float64, generator=generator) for n in (count, 9))
    classes = torch.arange(count) % 2
    features[:, 0] += classes
    told = linear_probe(features, classes, tested)
    torch.testing.assert_close(told.double(), newton(features, classes, tested), rtol=0, atol=1e-4)
    assert told.dtype == torch.float32


def test_separable_classes_are_separated():
    """Rows are distributions; constant features, and the scale of the others, do not matter."""
    centers = torch.eye(3).repeat_interleave(2, 1)
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(30) % 3
    features = 5 * centers[classes] + torch.randn(30, 6, generator=generator)
    told = linear_probe(features, classes, 5 * centers)
    assert told.argmax(1).tolist() == [0, 1, 2]
    torch.testing.assert_close(told.exp().sum(1), torch.ones(3))
    scaled = torch.cat([1e4 * features, torch.full((30, 1), 7.0)], 1)
    again = linear_probe(scaled, classes, torch.cat([5e4 * centers, torch.full((3, 1), 7.0)], 1))
    torch.testing.assert_close(again, told, rtol=0, atol=1e-3)  # other rounding, the same flat optimum
