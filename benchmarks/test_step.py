"""Times of one training step by pytest-benchmark, each round beside a plain step to compare with.

With `--benchmark-disable` a tiny model takes one step of every variant, to see that all of them run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from benchmarks import cost
from benchmarks.step import milliseconds, table
from benchmarks.workloads import PLAIN, SMOLLM2_135M, TINY, VARIANTS, Workload, batch, build, step

ROUNDS = {SMOLLM2_135M.of(10, 48): 2, SMOLLM2_135M.of(10, 128): 1}


@dataclass
class Comparison:
    """What the variants of one workload have shown so far; times in milliseconds, one per round."""

    workload: Workload
    rounds: int
    model: nn.Module
    bystander: nn.Module
    costs: dict[str, cost.Cost] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    plain: dict[str, list[float]] = field(default_factory=dict)


@pytest.fixture(scope="module", params=ROUNDS, ids=lambda workload: f"{workload.sequences}x{workload.tokens}")
def comparison(request: pytest.FixtureRequest) -> Iterator[Comparison]:
    """The models of one workload, warmed up; prints what was measured once all its variants are through."""
    workload = TINY if request.config.getoption("benchmark_disable") else request.param
    result = Comparison(workload, ROUNDS[request.param], build(workload), build(workload))
    milliseconds(workload, result.bystander, PLAIN)
    yield result
    if PLAIN in result.times:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n\n{workload.label}\n{table(result.costs, result.times, result.plain)}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_step(benchmark: BenchmarkFixture, comparison: Comparison, variant: str) -> None:
    comparison.costs[variant] = cost.count(comparison.workload, comparison.model, variant)
    plain = comparison.plain[variant] = []
    attached = VARIANTS[variant](comparison.model, 0)
    arguments = comparison.model, batch(comparison.workload), attached

    def plain_step_first() -> tuple[tuple[object, ...], dict[str, object]]:
        # On a model of its own, because the variant stays attached to the other.
        plain.append(milliseconds(comparison.workload, comparison.bystander, PLAIN))
        return arguments, {}

    try:
        benchmark.pedantic(step, setup=plain_step_first, rounds=comparison.rounds)
    finally:
        if attached is not None:
            attached.close()
    if benchmark.enabled:
        comparison.times[variant] = [1e3 * seconds for seconds in benchmark.stats.stats.data]
