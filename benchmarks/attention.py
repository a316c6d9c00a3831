"""Times the trace of attention, forward and backward, beside flash attention of the same shape.

python -m benchmarks.attention --out benchmarks/results/attention_gpu.csv

- `flash`: PyTorch's fused attention alone, what a model runs anyway; `flash_ratio` is relative to its same direction.
- `eager`: the reference, with matrices of all scores; `triton`: the kernels; on a CPU `blocked`: PyTorch operations on
  blocks of rows.

Queries are causal and rotated, as in Llama. An implementation whose results are wrong at a small size is not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import timing
from benchmarks.table import commit, device_name, significant, triton_version, writing
from ofa_kernels import reference
from ofa_kernels.blocked import attention_trace as blocked
from ofa_kernels.reference import Rotary

REPEATS = {"cuda": 20, "cpu": 2}
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
"""‖out − ref‖ / ‖ref‖ from which an implementation is refused; the reference has float64 inputs of the same values."""
CHECKED_TOKENS = 96
EAGER_TOKENS = 2048
"""Beyond this the reference's matrices of all scores take tens of gigabytes."""
FLASH = "flash"


@dataclass(frozen=True)
class Case:
    """Heads and tokens of one call; keys and values have `shared` heads."""

    name: str
    heads: int
    shared: int
    width: int
    sequences: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16


LLAMA2_7B = Case("llama2_7b", heads=32, shared=32, width=128, sequences=1, tokens=2048)
LLAMA3_8B = replace(LLAMA2_7B, name="llama3_8b", shared=8)
TINY = Case("tiny", heads=4, shared=2, width=16, sequences=1, tokens=64)
CASES = {
    "cuda": tuple(
        replace(case, sequences=sequences, tokens=tokens)
        for case in (LLAMA2_7B, LLAMA3_8B)
        for sequences, tokens in ((4, 512), (1, 2048), (4, 2048), (1, 8192))
    ),
    "cpu": (TINY,),
}


@dataclass(frozen=True)
class Row:
    """One number; `flash_ratio` is to flash attention in the same direction, `error` stands where one was refused."""

    benchmark: str
    variant: str
    model: str
    sequences: int
    tokens: int
    dtype: str
    metric: str
    value: float
    unit: str
    device: str
    torch: str
    triton: str
    commit: str


@dataclass(frozen=True)
class Inputs:
    """What `attention_trace` is given, in its order, and its rotary embedding."""

    tensors: tuple[Tensor, ...]
    rotary: Rotary

    def converted(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype."""
        rotary = Rotary(self.rotary.cos.to(dtype), self.rotary.sin.to(dtype))
        return Inputs(tuple(tensor.to(dtype) for tensor in self.tensors), rotary)


def draw(case: Case, device: torch.device) -> Inputs:
    """Random heads with scores of about one unit; the output is that of attention, the constants are float32."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    query = random(case.sequences, case.heads, case.tokens, case.width).to(case.dtype)
    key, value = (random(case.sequences, case.shared, case.tokens, case.width).to(case.dtype) for _ in range(2))
    output = attention(query, key, value).contiguous()
    trace = case.heads, case.width, case.width
    constants = random(*trace) / case.width, random(*trace) / case.width, random(case.heads)
    angles = torch.arange(case.tokens, device=device)[:, None] * 1e-2 ** torch.linspace(
        0, 1, case.width // 2, device=device
    )
    rotary = Rotary(*(part.to(case.dtype).unsqueeze(0) for part in (angles.cos(), angles.sin())))
    return Inputs((query, key, value, output, *constants), rotary)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention as models run it, (B, H, T, d)."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def implementations(case: Case, device: torch.device) -> dict[str, Callable[..., Any]]:
    """Everyone who computes the trace here, the reference first."""
    found: dict[str, Callable[..., Any]] = {}
    if case.tokens <= EAGER_TOKENS:
        found["eager"] = reference.attention_trace
    if device.type != "cuda":
        return found | {"blocked": blocked.attention_trace}
    from ofa_kernels.ops import attention_trace as kernels

    return found | {"triton": kernels.attention_trace}


def relative_error(function: Callable[..., Any], case: Case, device: torch.device) -> float:
    """The largest ‖out − ref‖ / ‖ref‖ of both results on a few tokens."""
    given = draw(replace(case, sequences=1, tokens=min(case.tokens, CHECKED_TOKENS)), device)
    expected = _traced(reference.attention_trace, given.converted(torch.float64), case)()
    actual = _traced(function, given, case)()
    gaps = [(a.double() - e).norm() / e.norm() for a, e in zip(actual, expected, strict=True)]
    # Python's max would lose a NaN.
    return float(torch.stack(gaps).max())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases and write the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--repeats", type=int, default=REPEATS[device.type], help="timed calls of each implementation")
    options = parser.parse_args(arguments)
    with writing(options.out, Row) as write:
        for case in CASES[device.type]:
            write(_measure(case, device, options.repeats))


def _measure(case: Case, device: torch.device, repeats: int) -> Iterator[Row]:
    given = draw(case, device)
    heads = given.tensors[:3]
    flash: dict[str, float] = {}
    for direction, call in _both_directions(attention, heads, _gradients(attention(*heads))).items():
        with _fused(device):
            times = timing.measure([call], device, repeats)
        flash[direction] = times.median
        yield from _rows(case, device, direction, FLASH, times, times.median)
    for name, function in implementations(case, device).items():
        if not (error := relative_error(function, case, device)) <= TOLERANCE[case.dtype]:
            print(f"{case} {name} refused: error {error:.2g}", file=sys.stderr)
            yield _row(case, device, "attention_trace", name, "error", error, "1")
            continue
        try:
            call = partial(_call, function, given.rotary, case)
            for direction, one in _both_directions(call, given.tensors, _gradients(call(*given.tensors))).items():
                times = timing.measure([one], device, repeats)
                yield from _rows(case, device, direction, name, times, flash[direction])
        except torch.OutOfMemoryError as failure:
            print(f"{case} {name} failed: {str(failure)[:200]}", file=sys.stderr)


def _both_directions(
    function: Callable[..., Any], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> dict[str, Callable[[], Any]]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    results = function(*leaves)
    results = (results,) if isinstance(results, Tensor) else results
    backward = partial(torch.autograd.grad, results, leaves, gradients, retain_graph=True)
    return {"forward": partial(function, *(tensor.detach() for tensor in inputs)), "backward": backward}


def _gradients(results: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn_like(result) for result in ([results] if isinstance(results, Tensor) else results)]


def _traced(function: Callable[..., Any], given: Inputs, case: Case) -> Callable[[], Any]:
    return partial(_call, function, given.rotary, case, *given.tensors)


def _call(function: Callable[..., Any], rotary: Rotary, case: Case, *tensors: Tensor) -> Any:
    return function(*tensors, scale=case.width**-0.5, causal=True, rotary=rotary)


def _fused(device: torch.device) -> Any:
    # On a CPU PyTorch has no other fused attention to be mistaken for it.
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION if device.type == "cuda" else [*_CPU_BACKENDS])


_CPU_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)


def _rows(
    case: Case, device: torch.device, direction: str, variant: str, times: timing.Times, flash: float
) -> Iterator[Row]:
    benchmark = f"attention_trace_{direction}"
    yield _row(case, device, benchmark, variant, "time_median", times.median, "ms")
    yield _row(case, device, benchmark, variant, "time_p20", times.p20, "ms")
    yield _row(case, device, benchmark, variant, "time_p80", times.p80, "ms")
    yield _row(case, device, benchmark, variant, "flash_ratio", times.median / flash, "1")


def _row(case: Case, device: torch.device, benchmark: str, variant: str, metric: str, value: float, unit: str) -> Row:
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[case.dtype]
    size = case.sequences, case.tokens, dtype
    origin = device_name(device), torch.__version__, triton_version(), commit()
    return Row(benchmark, variant, case.name, *size, metric, significant(value), unit, *origin)


if __name__ == "__main__":
    main()
