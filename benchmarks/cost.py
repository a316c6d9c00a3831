"""Counts what a training step costs, exactly and repeatably: floating-point operations and saved activations.

`python -m benchmarks.cost` prints the counts of every variant and their ratios to plain norm tuning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.workloads import (
    LLAMA2_7B_LAYERS,
    PLAIN,
    SMOLLM2_135M,
    VARIANTS,
    Attached,
    Workload,
    batch,
    build,
    loss,
    step,
)

WORKLOADS = (
    SMOLLM2_135M.of(10, 48),
    SMOLLM2_135M.of(10, 128),
    LLAMA2_7B_LAYERS.of(1, 128),
    LLAMA2_7B_LAYERS.of(1, 512),
)

DRAWS = 4
"""Passes that are averaged where each pass measures other steps."""


@dataclass(frozen=True)
class Cost:
    """FLOPs of one forward and backward pass, and bytes that the forward pass keeps for the backward."""

    flops: float
    saved_bytes: float


def count(workload: Workload, model: nn.Module, variant: str) -> Cost:
    """The cost of one training step of a variant; `model` is `build(workload)`, and comes back as it was."""
    ids, attached = batch(workload), VARIANTS[variant](model)
    draws = DRAWS if variant.endswith("quarter") else 1
    try:
        saved = fmean(_saved_bytes(model, ids, attached) for _ in range(draws))
        with _eager_attention(model):
            return Cost(fmean(_flops(model, ids, attached) for _ in range(draws)), saved)
    finally:
        if attached is not None:
            attached.close()


def main() -> None:
    """Print the counts of all workloads."""
    for workload in WORKLOADS:
        model = build(workload)
        costs = {variant: count(workload, model, variant) for variant in VARIANTS}
        plain = costs[PLAIN]
        print(workload.label)
        for variant, cost in costs.items():
            flops, saved = cost.flops / plain.flops, cost.saved_bytes / plain.saved_bytes
            print(f"  {variant:20} {cost.flops:.4e} FLOP ({flops:.3f})  {cost.saved_bytes:.4e} bytes ({saved:.3f})")


def _flops(model: nn.Module, ids: Tensor, attached: Attached | None) -> int:
    """Counted on tensors that have a shape and no contents: the operations are the same, and nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        step(model, ids, attached)
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def _saved_bytes(model: nn.Module, ids: Tensor, attached: Attached | None) -> int:
    """Bytes of all storages that autograd keeps, each once; parameters and buffers would be there anyway."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, UntypedStorage] = {}

    def keep(tensor: Tensor) -> None:
        # Holding the storage keeps its address from being given to another one. The graph gets nothing, since there
        # is no backward pass: a tensor handed back to the node that made it would be a cycle, and never be freed.
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    with saved_tensors_hooks(keep, lambda nothing: nothing):
        loss(model, ids, attached)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """Attention as two matrix products: the counter knows no FLOPs of the CPU's fused kernel."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


if __name__ == "__main__":
    main()
