"""Counts what a training step costs, exactly and repeatably: floating-point operations and saved activations.

`python -m benchmarks.cost` prints the counts of every variant as ratios to plain norm tuning.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from benchmarks.workloads import LLAMA2_7B_LAYER, SMOLLM2_135M, VARIANTS, Workload, batch

COUNTED = (
    SMOLLM2_135M.of(10, 48),
    SMOLLM2_135M.of(10, 128),
    LLAMA2_7B_LAYER.of(1, 128),
    LLAMA2_7B_LAYER.of(1, 512),
)


@dataclass(frozen=True)
class Cost:
    """FLOPs of one forward and backward pass, and bytes that the forward pass keeps for the backward."""

    flops: int
    saved_bytes: int


def count(workload: Workload, model: nn.Module, variant: str) -> Cost:
    """The cost of one training step of a variant; `model` is `build(workload)`."""
    ids, attached = batch(workload), VARIANTS[variant](model)
    try:
        return Cost(_flops(model, ids, attached), _saved_bytes(model, ids, attached))
    finally:
        if attached is not None:
            attached.close()


def count_all(workload: Workload, model: nn.Module) -> dict[str, Cost]:
    """The cost of every variant."""
    return {variant: count(workload, model, variant) for variant in VARIANTS}
