"""Times of one training step with pytest-benchmark; every round takes a plain step first, to compare with.

With `--benchmark-disable` a tiny model takes one step of each variant, to see that everything runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import pytest

from benchmarks import cost
from benchmarks.step import milliseconds, table
from benchmarks.workloads import PLAIN, SMOLLM2_135M, TINY, VARIANTS, batch, build, step


@pytest.fixture(scope="module", params=[(10, 48, 3), (10, 128, 1)], ids=lambda size: f"{size[0]}x{size[1]}")
def measured(request: pytest.FixtureRequest) -> Iterator[Measured]:
    """..."""
