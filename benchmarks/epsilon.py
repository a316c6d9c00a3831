"""How the finite-difference step ε of Hutchinson's estimator should follow the dtype, on the default model.

`python -m benchmarks.epsilon` prints, per dtype and ε, two errors of the traces against float64 with the same probes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import ofa
from ofa.tasks import load_task

STEPS = {
    torch.float32: (1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    torch.bfloat16: (1e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    torch.float16: (1e-3, 1e-2, 3e-2, 1e-1, 3e-1),
}
REFERENCE_EPSILON = 1e-4
"""In float64, where the norms of the library still compute in float32: a smaller one would measure their rounding."""


def traces(model: Any, batch: dict[str, Tensor], epsilon: float) -> Tensor:
    """h_t of every step and sequence, (T, B), float64, always from the same probes."""
    with ofa.fused_regularizers(model, step_ratio=0, sharpness=1, epsilon=epsilon, seed=1) as regularizers:
        with torch.no_grad(), regularizers.measuring():
            model(**batch)
        measured = regularizers.measurements.traces
    assert measured is not None
    return measured.double()


def errors(measured: Tensor, reference: Tensor) -> tuple[float, float]:
    """Norm of the error over the norm of the reference; median of the relative errors (traces below 0.1 as 0.1)."""
    difference = measured - reference
    relative = difference.abs() / reference.abs().clamp_min(0.1)
    return float(difference.norm() / reference.norm()), float(relative.median())


def main() -> None:
    """Print one line per dtype and ε."""
    loaded = ofa.load_model("embedded", device="cpu")
    data = load_task("reviews")
    prompts = [data.task.prompt(example.text) for example in data.train[:4]]
    batch = dict(loaded.tokenizer(prompts, return_tensors="pt", padding=True))
    for dtype, epsilons in STEPS.items():
        # The reference has the weights as this dtype rounds them: what is measured is the estimate, not the rounding.
        model = copy.deepcopy(loaded.model).to(dtype)
        reference = traces(copy.deepcopy(model).double(), batch, REFERENCE_EPSILON)
        ofa.tune_norms(model)
        for epsilon in epsilons:
            norm, median = errors(traces(model, batch, epsilon), reference)
            print(f"{str(dtype).removeprefix('torch.'):9} {epsilon:7.0e} {norm:8.4f} {median:8.4f}", flush=True)


if __name__ == "__main__":
    main()
