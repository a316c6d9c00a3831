"""Times the curvature kernels of one layer, the reference, and a copy of the bytes that they read.

python -m benchmarks.curvature_kernels --out benchmarks/results/curvature_gpu.csv

- `eager`: the reference in plain PyTorch; `triton`: the kernels, with PyTorch's sums after them.
- `bandwidth`: bytes that must be read, each once, by time; `copy_share`: relative to a large copy's.
- `flash_ratio` of `attention_curvature`: its time relative to PyTorch's fused attention, forward.

An implementation whose results are wrong is not timed.
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

from benchmarks import timing
from benchmarks.table import commit, device_name, significant, triton_version, writing
from ofa_kernels import reference
from ofa_kernels.reference import Attends, Move, Rotary

REPEATS = {"cuda": 30, "cpu": 2}
TOLERANCE = 2e-2
"""Largest accepted ‖out − ref‖ / ‖ref‖: bfloat16 rounds by 2⁻⁹, and its sums cancel in part."""
READ = 8
"""Channels of the radial term, as in training."""


@dataclass(frozen=True)
class Case:
    """One layer and one batch; keys and values have `shared` heads."""

    name: str
    width: int
    inner: int
    heads: int
    shared: int
    head: int
    sequences: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16


LLAMA2_7B = Case("llama2_7b", 4096, 11008, heads=32, shared=32, head=128, sequences=1, tokens=2048)
LLAMA3_8B = Case("llama3_8b", 4096, 14336, heads=32, shared=8, head=128, sequences=1, tokens=2048)
TINY = Case("tiny", 64, 96, heads=4, shared=2, head=16, sequences=2, tokens=21, dtype=torch.float32)
CASES = {
    "cuda": (
        LLAMA2_7B,
        replace(LLAMA2_7B, tokens=512),
        replace(LLAMA2_7B, sequences=10, tokens=128),
        replace(LLAMA2_7B, tokens=8192),
        LLAMA3_8B,
    ),
    "cpu": (TINY,),
}
OPERATIONS = ("attention_curvature", "attention_trace", "attention_diagonal", "mlp_curvature", "mlp_diagonal")

Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One number; `error` says why an implementation was refused."""

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


def implementations(device: torch.device) -> dict[str, dict[str, Callable[..., Any]]]:
    """All implementations of these operations on a device, the reference first."""
    found = {"eager": {name: getattr(reference, name) for name in OPERATIONS}}
    if device.type == "cuda":
        found["triton"] = kernels()
    return found


def kernels() -> dict[str, Callable[..., Any]]:
    """The operations that launch the kernels."""
    from ofa_kernels.ops import attention_curvature, branch_diagonal, mlp_curvature

    where = (attention_curvature, branch_diagonal, branch_diagonal, mlp_curvature, branch_diagonal)
    return {name: getattr(module, name) for name, module in zip(OPERATIONS, where, strict=True)}


def calls(functions: dict[str, Callable[..., Any]], case: Case, device: torch.device) -> dict[str, tuple[Call, int]]:
    """A call of each operation on random tensors, and the bytes that it must read; attention is causal and rotated."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    b, t, h, k, d = case.sequences, case.tokens, case.heads, case.shared, case.head
    query, key, value = (random(b, t, count, d).transpose(1, 2) for count in (h, k, k))
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=h != k)
    weights = torch.full((b, t), 1 / t, device=device)
    angle = random(1, t, d // 2)
    seen = [random(b, h, t, READ, dtype=torch.float32) for _ in range(3)]
    attention = partial(
        functions["attention_curvature"], query, key, value, output, weights, Attends(d**-0.5, causal=True),
        rotary=Rotary(angle.cos(), angle.sin()), move=Move(None, None, *seen),
    )  # fmt: skip
    projections = [random(count, d, case.width) * case.width**-0.5 for count in (h, k, k)]
    last = (random(case.width, h * d) * case.width**-0.5).unflatten(1, (h, d)).transpose(0, 1)
    sums = (random(b, h, d, d, dtype=torch.float32), random(b, h, d, d, dtype=torch.float32), weights.new_ones(b, h))
    scale = weights.new_ones(case.width)
    gate, up = random(b, t, case.inner), random(b, t, case.inner)
    read = random(b, READ, case.inner)
    inputs = [random(case.inner, case.width) for _ in range(2)]
    down, slopes = random(case.width, case.inner), [random(b, case.inner, dtype=torch.float32) for _ in range(2)]
    four, three = (*projections, last), (*inputs, down)
    return {
        "attention_curvature": (attention, _nbytes(query, key, value, output)),
        "attention_trace": (partial(functions["attention_trace"], *four, sums, scale), _nbytes(*four)),
        "attention_diagonal": (
            partial(functions["attention_diagonal"], *four, tuple(x[0] for x in sums)),
            _nbytes(*four),
        ),
        "mlp_curvature": (
            partial(functions["mlp_curvature"], gate, up, weights, activation="silu", read=read),
            _nbytes(gate, up),
        ),
        "mlp_diagonal": (partial(functions["mlp_diagonal"], inputs, down, slopes), _nbytes(*three)),
    }


def relative_error(found: Any, expected: Any) -> float:
    """The largest ‖out − ref‖ / ‖ref‖ of all results."""
    pairs = [(a, e) for a, e in zip(_tensors(found), _tensors(expected), strict=True)]
    # Python's max would lose a NaN.
    return float(torch.stack([(a - e).norm() / e.norm() for a, e in pairs]).max())


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases and write the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--repeats", type=int, default=REPEATS[device.type], help="timed calls of each implementation")
    options = parser.parse_args(arguments)
    copied = timing.copy_bandwidth(device, options.repeats)
    with writing(options.out, Row) as write:
        for case in CASES[device.type]:
            write(_measure(case, device, options.repeats, copied))


def _measure(case: Case, device: torch.device, repeats: int, copied: float) -> Iterator[Row]:
    flash = timing.measure([_flash(case, device)], device, repeats)
    expected: dict[str, Any] = {}
    for variant, functions in implementations(device).items():
        for name, (call, nbytes) in calls(functions, case, device).items():
            row = partial(_row, case, device, name, variant)
            try:
                found = call()
                error = relative_error(found, expected.setdefault(name, found))
                if not error <= TOLERANCE:
                    print(f"{case} {name} {variant} refused: error {error:.2g}", file=sys.stderr)
                    yield row("error", error, "1")
                    continue
                del found
                times = timing.measure([call], device, repeats)
            except torch.OutOfMemoryError as failure:
                # The reference holds blocks of scores and float32 copies of weights.
                print(f"{case} {name} {variant}: {failure}", file=sys.stderr)
                continue
            rate = nbytes / (1e-3 * times.median)
            yield row("time_median", times.median, "ms")
            yield row("time_p20", times.p20, "ms")
            yield row("time_p80", times.p80, "ms")
            yield row("bandwidth", 1e-9 * rate, "GB/s")
            yield row("copy_share", rate / copied, "1")
            if name == "attention_curvature":
                yield row("flash_ratio", times.median / flash.median, "1")


def _flash(case: Case, device: torch.device) -> Call:
    shape = case.sequences, case.heads, case.tokens, case.head
    query, key, value = (torch.randn(shape, device=device).to(case.dtype) for _ in range(3))
    return partial(F.scaled_dot_product_attention, query, key, value, is_causal=True)


def _nbytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if x is not None]


def _row(case: Case, device: torch.device, benchmark: str, variant: str, metric: str, value: float, unit: str) -> Row:
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[case.dtype]
    origin = device_name(device), torch.__version__, triton_version(), commit()
    size = case.name, case.sequences, case.tokens
    return Row(benchmark, variant, *size, dtype, metric, significant(value), unit, *origin)


if __name__ == "__main__":
    main()
