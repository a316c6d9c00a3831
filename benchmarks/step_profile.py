"""Where the time of a step with the closed form goes on a CPU: `python -m benchmarks.step_profile`."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.workloads import PLAIN, SMOLLM2_135M, VARIANTS, batch, build, step

PARTS = {
    "products of the model's weights": ("aten::mm",),
    "attention traces": ("_AttentionTrace", "_AttentionTraceBackward"),
    "MLP traces": ("_MlpTrace", "_MlpTraceBackward"),
    "norm traces": ("_NormTrace", "_NormTraceBackward"),
    "gradients of the constants": ("_ConstantsBackward",),
}


def milliseconds(model: nn.Module, variant: str) -> dict[str, float]:
    """Processor time of one step by part, and in all; the scales have moved since the step before."""
    ids, attached = batch(SMOLLM2_135M), VARIANTS[variant](model, 0)
    try:
        step(model, ids, attached)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1 + 1e-6)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step(model, ids, attached)
    finally:
        if attached is not None:
            attached.close()
    events = profiler.key_averages()
    times = {
        part: sum(event.cpu_time_total for event in events if event.key in names) / 1e3 for part, names in PARTS.items()
    }
    return {**times, "all": sum(event.self_cpu_time_total for event in events) / 1e3}


def rates() -> tuple[float, float]:
    """FLOP per second of a projection of this model's rows, and bytes per second of one elementwise pass over them."""
    rows, weight = torch.randn(480, 576), torch.randn(576, 1536)
    wide = rows @ weight
    result = torch.empty_like(wide)
    product = _shortest(lambda: torch.mm(rows, weight, out=result))
    elementwise = _shortest(lambda: torch.mul(wide, wide, out=result))
    return 2 * rows.numel() * weight.shape[1] / product, 3 * wide.nbytes / elementwise


def _shortest(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(100):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    """Print both profiles and the two rates."""
    model = build(SMOLLM2_135M)
    plain, exact = (milliseconds(model, variant) for variant in (PLAIN, "exact"))
    print(f"{'ms':34} {'plain':>8} {'exact':>8} {'added':>8}")
    for part, value in exact.items():
        print(f"{part:34} {plain[part]:8.0f} {value:8.0f} {value - plain[part]:8.0f}")
    product, elementwise = rates()
    print(f"products {product / 1e9:.0f} GFLOP/s, elementwise {elementwise / 1e9:.0f} GB/s, one thread")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
