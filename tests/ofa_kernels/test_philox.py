"""The probes: published random numbers, a pure function of the counter, with the moments that the estimators need."""

from __future__ import annotations

import math

import pytest
import torch

from ofa_kernels.philox import PROBES, philox4x32, probes

# Known-answer vectors of Philox-4x32-10 as published with Random123 (file kat_vectors).
KNOWN_ANSWERS = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}
both_probes = pytest.mark.parametrize("probe", PROBES)


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_philox_gives_the_published_integers(counter, key, answer):
    assert philox4x32(torch.tensor(words(counter)), tuple(words(key))).tolist() == words(answer)


def test_philox_of_a_stack_of_counters_is_philox_of_each():
    counters = torch.tensor([words(counter) for counter, _, _ in KNOWN_ANSWERS.values()])
    stacked = philox4x32(counters.view(3, 1, 4), (7, 8)).view(3, 4)
    assert stacked.tolist() == [philox4x32(counter, (7, 8)).tolist() for counter in counters]


def test_signs_are_the_bits_of_the_counter_block_lowest_first():
    """The layout is the contract between the reference and the kernels: bit c % 32 of word c // 32, set means −1."""
    block, row, sample, step, seed = 1, 3, 2, 9, (5 << 32) | 4
    answer = philox4x32(torch.tensor([block, row, sample, step]), (4, 5)).tolist()
    expected = [1 - 2 * (answer[channel // 32] >> channel % 32 & 1) for channel in range(128)]
    values = probes(4, 256, samples=3, seed=seed, step=step)
    assert values[sample, row, 128 * block :].tolist() == expected


def test_normals_are_box_muller_pairs_of_the_counter_block():
    block, row, sample, step, seed = 2, 1, 1, 6, 11
    unit = [(word + 0.5) / 2**32 for word in philox4x32(torch.tensor([block, row, sample, step]), (seed, 0)).tolist()]
    expected = []
    for first, second in (unit[:2], unit[2:]):
        radius = math.sqrt(-2 * math.log(first))
        expected += [radius * math.cos(2 * math.pi * second), radius * math.sin(2 * math.pi * second)]
    values = probes(2, 12, samples=2, seed=seed, step=step, probe="gaussian")[sample, row, 4 * block :]
    # The uniform numbers have 24 bits in float32: the error of an angle is up to 2π·2⁻²⁴ ≈ 4e-7, times a radius
    # of at most 6.8.
    assert values.tolist() == pytest.approx(expected, abs=3e-6)


@both_probes
@pytest.mark.parametrize(("samples", "rows", "width"), [(1, 1, 1), (2, 3, 5), (1, 7, 127), (3, 2, 129), (3, 0, 8)])
def test_a_value_does_not_depend_on_how_many_were_asked_for(probe, samples, rows, width):
    whole = probes(7, 300, samples=3, seed=13, step=2, probe=probe)
    part = probes(rows, width, samples=samples, seed=13, step=2, probe=probe)
    assert torch.equal(part, whole[:samples, :rows, :width])
    assert part.dtype == torch.float32


@both_probes
@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"seed": 1 << 32}, {"seed": -1}, {"step": 1}, {"step": 1 << 31}],
    ids=["seed", "high word of the seed", "negative seed", "step", "high bit of the step"],
)
def test_other_seeds_and_steps_give_other_probes(probe, other):
    arguments = {"seed": 0, "step": 0, "probe": probe}
    first = probes(4, 128, samples=2, **arguments)
    second = probes(4, 128, samples=2, **{**arguments, **other})
    assert not any(torch.equal(a, b) for a, b in zip(first.flatten(0, 1), second.flatten(0, 1), strict=True))


@both_probes
def test_rows_samples_and_blocks_of_channels_all_differ(probe):
    values = probes(8, 256, samples=4, seed=0, probe=probe)
    pieces = {tuple(piece.tolist()) for piece in values.reshape(-1, 128)}
    assert len(pieces) == 8 * 4 * 2


def test_signs_are_signs():
    assert set(probes(8, 200, samples=2, seed=3).unique().tolist()) == {-1.0, 1.0}


@both_probes
def test_first_four_moments(probe):
    """Mean, variance and odd moments within four standard errors; the seed is fixed."""
    n = 2**17
    values = probes(n // 512, 512, samples=1, seed=5, probe=probe).double().flatten()
    # Standard error of a mean of n values xᵏ: √(Var(xᵏ)/n). For normal values Var(x, x², x³, x⁴) = 1, 2, 15, 96; for
    # signs odd powers have variance 1 and even powers are exactly 1.
    means, variances = ([0, 1, 0, 3], [1, 2, 15, 96]) if probe == "gaussian" else ([0, 1, 0, 1], [1, 0, 1, 0])
    for power, (mean, variance) in enumerate(zip(means, variances, strict=True), start=1):
        assert abs(float((values**power).mean()) - mean) <= 4 * math.sqrt(variance / n), f"moment {power}"


@both_probes
def test_channels_are_uncorrelated(probe):
    """E[ν νᵀ] = I makes the trace estimate unbiased."""
    n, width = 4096, 32
    nu = probes(n, width, samples=1, seed=17, probe=probe)[0].double()
    gap = nu.T @ nu / n - torch.eye(width, dtype=torch.float64)
    # Each off-diagonal entry has standard error 1/√n, a diagonal one at most √(2/n); 5 of them for the largest of 1024.
    assert float(gap.abs().max()) <= 5 * math.sqrt(2 / n)


def test_an_unknown_probe_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"rademacher, gaussian, not 'uniform'"):
        probes(1, 1, samples=1, seed=0, probe="uniform")
