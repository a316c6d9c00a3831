"""Which cases several files run: families by what they can do, and grids in which all pairs of values meet."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import combinations, product
from typing import Any

import pytest

from tests.families import BUILDERS

CAUSAL = [name for name in BUILDERS if name not in ("bert", "vit")]
"""Families that continue a text."""

POST_NORM = ("bert", "opt_post_norm")
"""Families whose norms come after the residual sum: they have no closed form."""

CLOSED = [name for name in BUILDERS if name not in POST_NORM]
"""Families whose trace has a closed form."""

Value = tuple[int, int]
"""An axis and the index of one of its values."""


def over_pairs(**axes: Collection[Any]) -> pytest.MarkDecorator:
    """Parametrize over rows of values in which all pairs occur; what takes three values at once needs its own test."""
    values = [list(axis) for axis in axes.values()]
    rows = [[axis[i] for axis, i in zip(values, row, strict=True)] for row in _rows([*map(len, values)])]
    return pytest.mark.parametrize(tuple(axes), rows, ids=["-".join(map(str, row)) for row in rows])


def _rows(sizes: list[int]) -> Iterator[list[int]]:
    axes = [[(axis, value) for value in range(size)] for axis, size in enumerate(sizes)]
    missing = {pair: None for one, other in combinations(axes, 2) for pair in product(one, other)}
    while missing:
        row = _row(axes, missing)
        for pair in combinations(row, 2):
            missing.pop(pair, None)
        yield [value for _, value in row]


def _row(axes: list[list[Value]], missing: dict[tuple[Value, Value], None]) -> list[Value]:
    """Start from a missing pair and take, axis by axis, the value that is in most missing pairs with those before."""
    row = list(next(iter(missing)))
    for axis, values in enumerate(axes):
        if axis not in dict(row):
            row.append(max(values, key=lambda value: sum(tuple(sorted((value, other))) in missing for other in row)))
    return sorted(row)
