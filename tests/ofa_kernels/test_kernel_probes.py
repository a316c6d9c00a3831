"""The kernels' probes are those of the specification, for any tile size."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from ofa_kernels.kernels.philox import _words, times_probe
from ofa_kernels.ops.launching import key
from ofa_kernels.philox import PROBES, probes
from tests.ofa_kernels.calls import DEVICE
from tests.ofa_kernels.test_philox import KNOWN_ANSWERS, words

ROWS, STEP, SEED = 3, 0xFFFFFFFE, (0x80000001 << 32) | 0xFFFFFFFF
"""A step and a seed whose words are negative as signed numbers."""


@triton.jit(do_not_specialize=["block", "row", "sample", "step", "seed_low", "seed_high"])
def write_words(out, block, row, sample, step, seed_low, seed_high):
    at = tl.arange(0, 1)
    w0, w1, w2, w3 = _words(block + at, row, sample, (step, seed_low, seed_high))
    tl.store(out + at, w0)
    tl.store(out + 1 + at, w1)
    tl.store(out + 2 + at, w2)
    tl.store(out + 3 + at, w3)


@triton.jit(do_not_specialize=["sample", "step", "seed_low", "seed_high"])
def write_probes(
    out, sample, step, seed_low, seed_high, GROUPS: tl.constexpr, TILES: tl.constexpr, GAUSSIAN: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    for tile in range(TILES):
        one = tl.cast(1.0, tl.float32)
        nu = times_probe(one, tile, row, sample, (step, seed_low, seed_high), GROUPS, GAUSSIAN)
        at = (tile * GROUPS + tl.arange(0, GROUPS)[:, None]) * 32 + tl.arange(0, 32)[None, :]
        tl.store(out + row * TILES * GROUPS * 32 + at, nu)


@pytest.mark.parametrize(("counter", "seed", "answer"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_philox_gives_the_published_integers(counter, seed, answer):
    out = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    signed = [(word ^ 0x80000000) - 0x80000000 for word in (*words(counter), *words(seed))]
    write_words[(1,)](out, *signed)
    assert [word & 0xFFFFFFFF for word in out.tolist()] == words(answer)


@pytest.mark.parametrize(("groups", "tiles"), [(4, 1), (4, 4), (8, 2), (16, 1)])
@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("sample", [0, 1])
def test_probes_do_not_depend_on_the_tile(groups, tiles, probe, sample):
    width = 32 * groups * tiles
    out = torch.full((ROWS, width), float("nan"), device=DEVICE)
    write_probes[(ROWS,)](out, sample, *key(SEED, STEP), groups, tiles, probe == "gaussian")
    expected = probes(ROWS, width, samples=2, seed=SEED, step=STEP, probe=probe, device=DEVICE)[sample]
    if probe == "rademacher":
        assert torch.equal(out, expected)
    else:
        # Angles have 24 bits: errors up to 2π·2⁻²⁴, times a radius of at most 6.8.
        torch.testing.assert_close(out, expected, rtol=0, atol=3e-6)
