"""Times one training step of every variant on a GPU: layers of Llama-2-7B and Llama-3-8B, and a whole Llama-2-7B.

python -m benchmarks.gpu_step --out benchmarks/results/step_gpu.csv
python -m benchmarks.gpu_step --what fused --out benchmarks/results/fused_gpu.csv
python -m benchmarks.gpu_step --what replays --out benchmarks/results/replays_gpu.csv

Weights are random bfloat16, norm scales float32; attention is PyTorch's fused one. `time` is wall clock between device
syncs, launch overhead included; `device_time` is the device's for a step queued as a whole, and `replay_time` wall
clock of a step that `ofa.graphed_step` replays. `peak_memory` is the peak allocation with weights, `step_memory` the
step's part of it; `host_time` ends when the step is launched. Replays are a separate run: a failed capture breaks the
random numbers of its process. `benchmarks.gpu_profile` lists the kernels of a step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
import transformers
from torch import Tensor, nn
from transformers import masking_utils

import ofa
from benchmarks import timing
from benchmarks.table import commit, device_name, significant, triton_version, writing
from benchmarks.workloads import (
    FUSED,
    LLAMA2_7B_LAYERS,
    LLAMA3_8B_LAYERS,
    PLAIN,
    TINY,
    VARIANTS,
    Attached,
    Workload,
    batch,
    build,
    loss,
    step,
)
from ofa.training import graphed_step

ROUNDS = 4
DEVICE_ROUNDS = 3
LONGEST = 1500.0
"""Milliseconds for all rounds of one variant, of which there are at least two."""
REPLAYED = (PLAIN, "step_ratio", "exact")
"""Variants whose step is also captured as a CUDA graph."""
BEFORE_REPLAYS = graphed_step.EAGER + 1
"""Steps until the first replay, which is compared with an eager step."""
PROBED = ("loop_n1", "loop_n4", "hutchinson_n1", "hutchinson_n4")
TIMED = (PLAIN, "step_ratio", *PROBED, "exact", "exact_every4")
FUSED_TIMED = (PLAIN, FUSED, "step_ratio", "fused_step_ratio", "exact", "fused_exact")
FULL_TIMED = (PLAIN, "step_ratio", "loop_n1", "hutchinson_n1", "exact", "exact_every4")

LAYERS = tuple(
    model.reshaped(model.name, num_hidden_layers=4).of(1, tokens)
    for model in (LLAMA2_7B_LAYERS, LLAMA3_8B_LAYERS)
    for tokens in (512, 2048, 8192)
)
FULL = LLAMA2_7B_LAYERS.reshaped("llama2_7b", num_hidden_layers=32, vocab_size=32000).of(4, 512)
WORKLOADS = {
    "cuda": {**dict.fromkeys(LAYERS, TIMED), FULL: FULL_TIMED},
    "cpu": {TINY: TIMED},
}
SHORT = 2048
"""Most tokens of the workloads whose steps are replayed or fused: in longer ones launching and norms are little."""


@dataclass(frozen=True)
class Row:
    """One number of the table; `ratio` metrics are relative to plain norm tuning in the same round.

    `fused_ratio` is relative to plain norm tuning with fused layers.
    """

    benchmark: str
    variant: str
    sequences: int
    tokens: int
    metric: str
    value: float
    unit: str
    device: str
    torch: str
    triton: str
    transformers: str
    commit: str


Maker = Callable[[str, str, float, str], Row]


@dataclass(frozen=True)
class Timed:
    """One step: milliseconds until done and until launched, peak bytes allocated and bytes before (0 on a CPU)."""

    milliseconds: float
    host: float
    peak: int
    before: int


def timed(workload: Workload, model: nn.Module, variant: str) -> Timed:
    """Time one step after another one, which fills the allocator, with a change of the scales between them."""
    ids, attached = given(workload, model), VARIANTS[variant](model, 0)
    device = ids.device
    try:
        step(model, ids, attached)
        move_scales(model)
        before = _start_of_step(device)
        started = time.perf_counter()
        step(model, ids, attached)
        host = 1e3 * (time.perf_counter() - started)
        finish(device)
        elapsed = 1e3 * (time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return Timed(elapsed, host, peak, before)
    finally:
        close(model, attached)


def device_times(workload: Workload, model: nn.Module, variant: str, rounds: int) -> timing.Times:
    """Milliseconds of device time of a step, without waiting for launches."""
    ids, attached = given(workload, model), VARIANTS[variant](model, 0)

    def once() -> None:
        step(model, ids, attached)
        move_scales(model)

    try:
        with _without_mask_checks():
            return timing.measure([once], ids.device, rounds)
    finally:
        close(model, attached)


def replayed(workload: Workload, model: nn.Module, variant: str, rounds: int) -> tuple[list[float], float]:
    """Milliseconds of every replayed step of `ofa.graphed_step`, and the error of its gradients.

    The error is ‖replayed − eager‖ / ‖eager‖ over all scales, which are changed after the capture.

    Raises:
        RuntimeError: the steps are eager, and why.
    """
    ids, attached = given(workload, model), VARIANTS[variant](model, 0)
    graphed = ofa.graphed_step(model, loss=lambda batch: loss(model, batch["input_ids"], None))

    def once() -> None:
        model.zero_grad(set_to_none=True)
        graphed({"input_ids": ids})

    try:
        for _ in range(BEFORE_REPLAYS):
            once()
        if not graphed.replays:
            raise RuntimeError(graphed.reason or next(iter(graphed.refused.values())))
        move_scales(model, 1 + 1e-2)
        times = [_milliseconds(once, ids.device) for _ in range(rounds)]
        actual = torch.cat([scale.grad.flatten() for scale in _scales(model)])
        step(model, ids, attached)
        expected = torch.cat([scale.grad.flatten() for scale in _scales(model)])
        return times, float((actual - expected).norm() / expected.norm())
    finally:
        graphed.close()
        close(model, attached)


@contextmanager
def _without_mask_checks() -> Iterator[None]:
    """Keep transformers from checking whether a batch is padded or packed, which syncs; the batches here are neither.

    During capture it cannot check and would make a full mask, which flash attention does not support.
    """
    own = masking_utils._ignore_causal_mask_sdpa, masking_utils.find_packed_sequence_indices
    masking_utils._ignore_causal_mask_sdpa = lambda *args, **kwargs: True
    masking_utils.find_packed_sequence_indices = lambda positions: None
    try:
        yield
    finally:
        masking_utils._ignore_causal_mask_sdpa, masking_utils.find_packed_sequence_indices = own


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all workloads and write the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workloads = {workload.label: workload for workload in WORKLOADS[device.type]}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds per workload")
    parser.add_argument("--only", choices=list(workloads), help="one workload instead of all")
    parser.add_argument("--what", choices=_MEASURES, default="times", help="which metrics")
    options = parser.parse_args(arguments)
    with writing(options.out, Row) as write:
        for label, workload in workloads.items():
            if options.only in (None, label) and (options.what == "times" or _is_short(workload)):
                model, row = build(workload, device, torch.bfloat16), _row_maker(workload, device)
                variants = WORKLOADS[device.type][workload]
                write(_MEASURES[options.what](row, workload, model, variants, options.rounds))


def _is_short(workload: Workload) -> bool:
    return workload.sequences * workload.tokens <= SHORT and workload != FULL


def _times(row: Maker, workload: Workload, model: nn.Module, variants: Sequence[str], rounds: int) -> Iterator[Row]:
    cuda = next(model.parameters()).is_cuda
    measured = _interleaved(workload, model, variants, rounds)
    plain = [one.milliseconds for one in measured[PLAIN]]
    print(workload.label, flush=True)
    for variant, steps in measured.items():
        times = [one.milliseconds for one in steps]
        yield from _time_rows(row, variant, "time", times)
        yield row(variant, "time_ratio", _ratio(times, plain), "1")
        if FUSED in measured:
            fused = _ratio(times, [one.milliseconds for one in measured[FUSED]])
            print(f"  {variant:20} time of fused plain {fused:7.3f}", flush=True)
            yield row(variant, "fused_ratio", fused, "1")
        yield row(variant, "host_time_median", median(one.host for one in steps), "ms")
        if cuda:
            yield row(variant, "peak_memory", max(one.peak for one in steps), "B")
            yield row(variant, "step_memory", max(one.peak - one.before for one in steps), "B")
    if cuda:
        yield from _device_rows(row, workload, model, list(measured))


def _ratio(times: Sequence[float], base: Sequence[float]) -> float:
    return median(own / other for own, other in zip(times, base, strict=False))


def _fused(row: Maker, workload: Workload, model: nn.Module, variants: Sequence[str], rounds: int) -> Iterator[Row]:
    return _times(row, workload, model, FUSED_TIMED, rounds)


def _interleaved(workload: Workload, model: nn.Module, variants: Sequence[str], rounds: int) -> dict[str, list[Timed]]:
    """Every variant once per round, after a round that compiles kernels; a variant that fails is named and left out."""
    able = []
    for variant in variants:
        try:
            timed(workload, model, variant)
            able.append(variant)
        except RuntimeError as failure:
            # One variant may run out of memory or not support a model; the others go on.
            if variant == PLAIN:
                raise
            print(f"{workload.label} {variant} failed: {str(failure)[:200]}", file=sys.stderr)
    measured: dict[str, list[Timed]] = {variant: [] for variant in able}
    for _ in range(rounds):
        for variant, steps in measured.items():
            if len(steps) < 2 or sum(one.milliseconds for one in steps) < LONGEST or variant == PLAIN:
                steps.append(timed(workload, model, variant))
    return measured


def _device_rows(row: Maker, workload: Workload, model: nn.Module, variants: Sequence[str]) -> Iterator[Row]:
    plain = 0.0
    for variant in variants:
        times = device_times(workload, model, variant, DEVICE_ROUNDS)
        plain = plain or times.median
        print(f"  {variant:20} device {times.median:9.2f} ms {times.median / plain:7.3f}", flush=True)
        yield row(variant, "device_time_median", times.median, "ms")
        yield row(variant, "device_time_ratio", times.median / plain, "1")


def _replays(row: Maker, workload: Workload, model: nn.Module, variants: Sequence[str], rounds: int) -> Iterator[Row]:
    plain = 0.0
    for variant in REPLAYED:
        times, error = replayed(workload, model, variant, rounds)
        print(f"{workload.label} {variant}, gradients {error:.2g} from eager ones")
        plain = plain or median(times)
        yield from _time_rows(row, variant, "replay_time", times)
        yield row(variant, "replay_time_ratio", median(times) / plain, "1")
        yield row(variant, "replay_gradient_error", error, "1")


def _time_rows(row: Maker, variant: str, metric: str, times: Sequence[float]) -> Iterator[Row]:
    low, *_, high = quantiles(times, n=5, method="inclusive") if len(times) > 1 else [*times, *times]
    print(f"  {variant:20} {metric} {median(times):9.2f} ms", flush=True)
    yield row(variant, f"{metric}_median", median(times), "ms")
    yield row(variant, f"{metric}_p20", low, "ms")
    yield row(variant, f"{metric}_p80", high, "ms")


_MEASURES = {"times": _times, "fused": _fused, "replays": _replays}


def given(workload: Workload, model: nn.Module) -> Tensor:
    """Its token ids, on the model's device."""
    return batch(workload, next(model.parameters()).device)


def _scales(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def move_scales(model: nn.Module, factor: float = 1 + 1e-6) -> None:
    """Change the scales as an optimizer would, which invalidates caches."""
    with torch.no_grad():
        for scale in _scales(model):
            scale.mul_(factor)


def _start_of_step(device: torch.device) -> int:
    finish(device)
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def finish(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _milliseconds(once: Callable[[], None], device: torch.device) -> float:
    finish(device)
    started = time.perf_counter()
    once()
    finish(device)
    return 1e3 * (time.perf_counter() - started)


def close(model: nn.Module, attached: Attached | None) -> None:
    """Free the memory of a variant and its steps."""
    model.zero_grad(set_to_none=True)
    if attached is not None:
        attached.close()


def _row_maker(workload: Workload, device: torch.device) -> Maker:
    origin = device_name(device), torch.__version__, triton_version(), transformers.__version__, commit()

    def row(variant: str, metric: str, value: float, unit: str) -> Row:
        size = workload.sequences, workload.tokens
        return Row(workload.name, variant, *size, metric, significant(value), unit, *origin)

    return row


if __name__ == "__main__":
    main()
