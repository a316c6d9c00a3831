"""Counts the floating-point operations and saved activations of a training step, exactly and repeatably.

`python -m benchmarks.cost` prints the counts of every variant and their ratios to plain norm tuning. Tensors
have shapes and no data: the operations are the same, and nothing is computed.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.workloads import (
    LLAMA2_7B_LAYERS,
    LLAMA3_8B_LAYERS,
    PLAIN,
    SMOLLM2_135M,
    VARIANTS,
    Attach,
    Attached,
    Workload,
    batch,
    build,
    loss,
    move_scales,
    regularized,
    step,
    steps_of,
)

# The package has functions of the same names.
_MLP, _DIAGONAL = (import_module(f"ofa_kernels.reference.{name}") for name in ("mlp_curvature", "branch_diagonal"))

WORKLOADS = (
    SMOLLM2_135M.of(4, 25),  # a batch of `ofa fit` on short texts
    SMOLLM2_135M.of(10, 48),
    SMOLLM2_135M.of(10, 128),
    SMOLLM2_135M.of(2, 1024),
    LLAMA2_7B_LAYERS.of(1, 128),
    LLAMA2_7B_LAYERS.of(1, 512),
    LLAMA2_7B_LAYERS.of(10, 128),
    LLAMA2_7B_LAYERS.of(10, 512),
    LLAMA3_8B_LAYERS.of(10, 128),
    LLAMA3_8B_LAYERS.of(10, 512),
)


@dataclass(frozen=True)
class Cost:
    """FLOPs of one forward and backward pass, and bytes that the forward pass keeps for the backward."""

    flops: float
    saved_bytes: float


def count(workload: Workload, model: nn.Module, variant: str) -> Cost:
    """The cost of one training step of a variant; `model` is `build(workload)` and is left unchanged."""
    given, rounds = (model, batch(workload), VARIANTS[variant]), steps_of(variant)
    return Cost(_flops(*given, rounds) / rounds, _saved_bytes(*given))


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


def flops_of(workload: Workload, model: nn.Module, estimator: str | None, samples: int) -> int:
    """FLOPs of one training step with an estimator and a number of probes; of a plain step for None."""
    attach = VARIANTS[PLAIN] if estimator is None else regularized(estimator, samples=samples)
    return _flops(model, batch(workload), attach)


def _flops(model: nn.Module, ids: Tensor, attach: Attach, rounds: int = 1) -> int:
    total = 0
    with _attached(attach(model, 0)) as attached:
        for _ in range(rounds):
            counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
            with FakeTensorMode(allow_non_fake_inputs=True), counter:
                step(model, ids, attached)
            total += counter.get_total_flops()
            move_scales(model)
    model.zero_grad(set_to_none=True)
    return total


def _saved_bytes(model: nn.Module, ids: Tensor, attach: Attach) -> int:
    """Bytes of all storages that autograd holds when the forward pass ends, each once.

    Without parameters and buffers, which exist anyway, and without tensors saved for unused results, which are freed
    by then.
    """
    alive: weakref.WeakSet[_Held] = weakref.WeakSet()

    def hold(tensor: Tensor) -> _Held:
        held = _Held(tensor.untyped_storage())
        alive.add(held)
        return held

    with _attached(attach(model, 0)) as attached, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        own = [mode.from_tensor(tensor) for tensor in (*model.parameters(), *model.buffers())]
        with saved_tensors_hooks(hold, lambda held: held):
            # Held by its graph until it is counted.
            value = loss(model, ids, attached)
        gc.collect()
        storages = {held.storage._cdata: held.storage for held in alive}
        for tensor in own:
            storages.pop(tensor.untyped_storage()._cdata, None)
        del value
    return sum(storage.nbytes() for storage in storages.values())


class _Held:
    """Replaces a saved tensor in the graph, for as long as the graph keeps it."""

    def __init__(self, storage: UntypedStorage) -> None:
        self.storage = storage


@contextmanager
def _attached(attached: Attached | None) -> Iterator[Attached | None]:
    """A variant's regularizers in this context, with loops over blocks in one pass: the counts are the same."""
    loops = ((_MLP, "BLOCK"), (_DIAGONAL, "BLOCK"), (_DIAGONAL, "TRANSPOSED"))
    before = [getattr(module, name) for module, name in loops]
    for module, name in loops:
        setattr(module, name, 1 << 40)
    try:
        yield attached
    finally:
        for (module, name), value in zip(loops, before, strict=True):
            setattr(module, name, value)
        if attached is not None:
            attached.close()


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""As PyTorch's counter for GPU attention, which does not count a causal mask as a saving."""


if __name__ == "__main__":
    main()
