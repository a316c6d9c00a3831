"""Times each attention kernel under other launches than its own: where the launch table is from.

python -m benchmarks.tune_attention --out benchmarks/results/tune_attention_gpu.csv [--kernels forward backward_rows …]

Every launch is compiled in one of several processes first, then timed alone in this one. The launch that the library
itself chooses is among them and marked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from benchmarks import timing, tuning
from benchmarks.attention import LLAMA2_7B, LLAMA3_8B, Case, Inputs, draw
from benchmarks.table import commit, device_name, significant, triton_version, writing
from ofa_kernels import launch
from ofa_kernels.launch import AttentionLaunch
from ofa_kernels.ops import attention_moments

PREFIX = "attention_moments_"
KERNELS = ("forward", "backward_rows", "backward_keys", "backward_values")
CASES = (LLAMA2_7B, replace(LLAMA2_7B, sequences=4, tokens=512), LLAMA3_8B, replace(LLAMA3_8B, width=64, heads=64))
LAUNCHES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "forward": ((64, 32, 4, 2), (64, 64, 4, 2), (128, 32, 8, 2), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 1)),
    "backward_rows": (
        *((64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (128, 32, 8, 2), (128, 32, 8, 3), (128, 64, 8, 1)),
        *((128, 32, 8, 1), (128, 16, 8, 3)),
    ),
    "backward_keys": (
        *((32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 2), (32, 128, 8, 2), (32, 128, 8, 3), (64, 128, 8, 1)),
        *((16, 64, 4, 2), (32, 128, 8, 1)),
    ),
    "backward_values": (
        *((32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 2), (32, 128, 8, 2), (32, 128, 8, 3), (64, 128, 8, 2)),
        *((64, 128, 8, 3), (16, 64, 4, 3)),
    ),
}
"""Queries, keys, warps and stages that are tried; a product of wgmma has 64 rows for each four warps."""
REPEATS = 20


@dataclass(frozen=True)
class Row:
    """One launch of one kernel; `chosen` is 1 for the library's own."""

    benchmark: str
    kernel: str
    model: str
    head: int
    sequences: int
    tokens: int
    block_rows: int
    block_columns: int
    num_warps: int
    num_stages: int
    max_registers: int
    chosen: int
    metric: str
    value: float
    unit: str
    device: str
    torch: str
    triton: str
    commit: str


def candidates(kernel: str) -> list[AttentionLaunch]:
    """What is tried besides the library's own launch."""
    return [AttentionLaunch(*launched, max_registers=255) for launched in LAUNCHES[kernel]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile and time all launches of all kernels, and write the table."""
    options = tuning.parser(__doc__, KERNELS).parse_args(arguments)
    device = torch.device("cuda")
    jobs = [
        (kernel, case, config)
        for kernel, case in product(options.kernels, CASES)
        for config in dict.fromkeys((_own(kernel, case), *candidates(kernel)))
    ]
    compiled = tuning.in_processes(_compile, jobs, options.processes)
    with writing(options.out, Row) as write:
        for job, problem in zip(jobs, compiled, strict=True):
            if problem is None:
                write(_timed(*job, device))
            else:
                print(f"{job[0]} {job[1].name} {job[2]}: {problem}", file=sys.stderr)


def _own(kernel: str, case: Case) -> AttentionLaunch:
    return launch.configure_attention(PREFIX + kernel, case.width, case.dtype.itemsize, "sm_90")


def _compile(job: tuple[str, Case, AttentionLaunch]) -> str | None:
    """Leave the binary in Triton's cache; what is wrong with it where there is none."""
    kernel, case, config = job
    try:
        small = replace(case, sequences=1, tokens=256)
        tuning.compile_launch(_captured(kernel, small, config, torch.device("cuda")))
    except Exception as failure:
        return tuning.reason(failure)
    return None


def _timed(kernel: str, case: Case, config: AttentionLaunch, device: torch.device) -> Iterator[Row]:
    function, grid, args, keywords = _captured(kernel, case, config, device)
    try:
        times = timing.measure([lambda: function[(grid,)](*args, **keywords)], device, REPEATS)
    except Exception as failure:
        print(f"{kernel} {case.name} {config}: {tuning.reason(failure)}", file=sys.stderr)
        return
    chosen = config == _own(kernel, case)
    sizes = f"{config.block_rows:4}x{config.block_columns:<4} {config.num_warps} warps {config.num_stages} stages"
    print(
        f"{kernel:17} {case.name} {case.width} {case.sequences}x{case.tokens} {sizes} {times.median:8.4f} ms",
        "*" * chosen,
    )
    yield Row(
        "tune_attention",
        kernel,
        case.name,
        case.width,
        case.sequences,
        case.tokens,
        config.block_rows,
        config.block_columns,
        config.num_warps,
        config.num_stages,
        config.max_registers or 0,
        int(chosen),
        "time_median",
        significant(times.median),
        "ms",
        device_name(device),
        torch.__version__,
        triton_version(),
        commit(),
    )


def _captured(kernel: str, case: Case, config: AttentionLaunch, device: torch.device) -> tuning.Launched:
    """The launch of one kernel that the operation would make, its inputs random."""
    name, own = PREFIX + kernel, launch.configure_attention
    with tuning.deciding(configure_attention=lambda other, *args: config if other == name else own(other, *args)):
        return tuning.captured(name, lambda: _call(draw(case, device), case), "sm_90")


def _call(given: Inputs, case: Case) -> None:
    query, key, value, output = given.tensors[:4]
    angle = torch.cat((given.rotary.cos, given.rotary.sin), -1)
    turn, aim = torch.randn_like(query), torch.randn_like(query)
    number = torch.randn(query.shape[:3], device=query.device)
    tensors = query, key, value, output, angle, turn, aim, None, None
    settings = case.width**-0.5, True, None
    attention_moments.forward(*tensors, *settings)
    # A log-sum-exp above all scores keeps the weights small.
    attention_moments.backward(*tensors, number + 10, number, number, torch.randn_like(output), *settings)


if __name__ == "__main__":
    main()
