"""Times the constants of frozen weights, forward and backward, beside a copy of as many bytes.

python -m benchmarks.constants --out benchmarks/results/constants_gpu.csv

- `eager`: the reference, with float32 copies of whole weights; `triton`: the kernels.
- `bandwidth`: bytes of the weights alone, each once, by time; `copy_share`: relative to a large copy's.

Shapes are those of one layer. An implementation whose results are wrong is not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.table import commit, device_name, significant, triton_version, writing
from ofa_kernels import reference

REPEATS = {"cuda": 30, "cpu": 2}
TOLERANCE = 1e-4
"""‖out − ref‖ / ‖ref‖ from which an implementation is refused; the reference has float32 copies of the same values."""


@dataclass(frozen=True)
class Case:
    """Weights of one layer; keys and values have `shared` heads."""

    name: str
    width: int
    inner: int
    heads: int
    shared: int
    head: int
    dtype: torch.dtype = torch.bfloat16


LLAMA2_7B = Case("llama2_7b", width=4096, inner=11008, heads=32, shared=32, head=128)
LLAMA3_8B = Case("llama3_8b", width=4096, inner=14336, heads=32, shared=8, head=128)
TINY = Case("tiny", width=64, inner=96, heads=4, shared=2, head=16)
CASES = {"cuda": (LLAMA2_7B, LLAMA3_8B), "cpu": (TINY,)}
BRANCHES = ("mlp", "attention")


@dataclass(frozen=True)
class Row:
    """One number; `error` stands where an implementation was refused."""

    benchmark: str
    variant: str
    model: str
    norm: str
    dtype: str
    metric: str
    value: float
    unit: str
    device: str
    torch: str
    triton: str
    commit: str


def draw(branch: str, case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Random weights in the order of the operation, and γ around 1."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * case.width**-0.5).to(case.dtype)

    scale = 1 + 0.1 * torch.randn(case.width, generator=generator, device=device)
    if branch == "mlp":
        gate, up = random(case.inner, case.width), random(case.inner, case.width)
        return gate, up, random(case.width, case.inner), scale
    query, key, value = (random(count, case.head, case.width) for count in (case.heads, case.shared, case.shared))
    output = random(case.width, case.heads * case.head).unflatten(1, (case.heads, case.head)).transpose(0, 1)
    return query, key, value, output, scale


def implementations(device: torch.device) -> dict[str, ModuleType]:
    """Everyone who computes the constants here, the reference first."""
    found: dict[str, ModuleType] = {"eager": reference}
    if device.type == "cuda":
        from ofa_kernels.ops import constants

        found["triton"] = constants
    return found


def directions(
    where: ModuleType, branch: str, given: Sequence[Tensor], centred: bool
) -> dict[str, Callable[[], object]]:
    """The constants and their gradient in γ, of one implementation."""
    grads = [torch.ones_like(one) for one in getattr(reference, f"{branch}_constants")(*given, centred)]
    return {
        "forward": partial(getattr(where, f"{branch}_constants"), *given, centred),
        "backward": partial(getattr(where, f"{branch}_constants_gradient"), *given, grads, centred),
    }


def relative_error(call: Callable[[], object], expected: Callable[[], object]) -> float:
    """The largest ‖out − ref‖ / ‖ref‖ of all results."""
    pairs = zip(_tensors(call()), _tensors(expected()), strict=True)
    # Python's max would lose a NaN.
    return float(torch.stack([(a - e).norm() / e.norm() for a, e in pairs]).max())


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
            for branch in BRANCHES:
                for centred in (False, True):
                    write(_measure(branch, case, centred, device, options.repeats, copied))


def _measure(
    branch: str, case: Case, centred: bool, device: torch.device, repeats: int, copied: float
) -> Iterator[Row]:
    given = draw(branch, case, device)
    nbytes = sum(weight.nbytes for weight in given[:-1])
    sets = [given, *(draw(branch, case, device) for _ in range(1, timing.sets_beyond_cache(nbytes, device)))]
    expected = directions(reference, branch, [weight.float() for weight in given], centred)
    for name, where in implementations(device).items():
        calls = [directions(where, branch, one, centred) for one in sets]
        for direction in expected:
            row = partial(_row, case, device, f"{branch}_constants_{direction}", name, "layer" if centred else "rms")
            if not (error := relative_error(calls[0][direction], expected[direction])) <= TOLERANCE:
                print(f"{case} {branch} {direction} {name} refused: error {error:.2g}", file=sys.stderr)
                yield row("error", error, "1")
                continue
            times = timing.measure([call[direction] for call in calls], device, repeats)
            rate = nbytes / (1e-3 * times.median)
            yield row("time_median", times.median, "ms")
            yield row("time_p20", times.p20, "ms")
            yield row("time_p80", times.p80, "ms")
            yield row("bandwidth", 1e-9 * rate, "GB/s")
            yield row("copy_share", rate / copied, "1")


def _tensors(result: object) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _row(
    case: Case, device: torch.device, benchmark: str, variant: str, norm: str, metric: str, value: float, unit: str
) -> Row:
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[case.dtype]
    origin = device_name(device), torch.__version__, triton_version(), commit()
    return Row(benchmark, variant, case.name, norm, dtype, metric, significant(value), unit, *origin)


if __name__ == "__main__":
    main()
