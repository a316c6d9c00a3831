"""Times of every operation at one small size by pytest-benchmark, once for everyone who computes it.

With `--benchmark-disable` each runs once, to see that all of them do.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.implementations import Case, Implementation, Pass, passes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASE = Case(2048 if DEVICE.type == "cuda" else 64, 576, torch.bfloat16, DEVICE)

IMPLEMENTATIONS = {
    f"{one.label} {name}": (one, implementation)
    for one in passes((1,))
    for name, implementation in one.operation.implementations(DEVICE).items()
}


@pytest.mark.parametrize(("one", "implementation"), IMPLEMENTATIONS.values(), ids=list(IMPLEMENTATIONS))
def test_kernel(benchmark: BenchmarkFixture, one: Pass, implementation: Implementation) -> None:
    call = implementation.prepare(*one.draw(CASE))

    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=10, warmup_rounds=2)
