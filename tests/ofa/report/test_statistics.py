"""Statistics against numbers computed by hand, and against other numpy code."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from ofa.comparison.outcomes import Draw, Problem, Row, by_row, metric
from ofa.report.statistics import (
    FEWEST_PAIRS,
    Interval,
    Spread,
    confusion,
    cost,
    fit_time_ratio,
    macro_average,
    macro_by_seed,
    mean_ranks,
    paired_difference,
    per_task,
    spread,
)
from tests.ofa.report.synthetic import record, score, with_accuracy

A, B = (Problem(name, 5, 500, f"hash of {name}") for name in ("a", "b"))


def values(numbers: dict[Problem, list[float]]) -> dict[Draw, float]:
    """Numbers of seeds 1, 2, … by task."""
    return {Draw(problem, seed): value for problem, row in numbers.items() for seed, value in enumerate(row, start=1)}


def row(name: str, context: str = "prompt") -> Row:
    return Row(name, name, frozenset(), context)


def outcomes(method: str, scores: dict[tuple[str, int], object], **fields: object):
    records = [record(method, {"prompt": one}, task=task, seed=seed, **fields) for (task, seed), one in scores.items()]
    (found,) = by_row(records).values()
    return found


def test_a_spread_is_the_mean_and_the_sample_deviation():
    """By hand: deviations −0.2, 0, 0.2 from 0.7; (0.04 + 0.04) / (3 − 1) = 0.04, whose root is 0.2."""
    found = spread([0.5, 0.7, 0.9])
    assert found.mean == pytest.approx(0.7)
    assert found.deviation == pytest.approx(0.2)
    assert found.count == 3


def test_one_number_has_no_deviation():
    assert spread([0.25]) == Spread(0.25, None, 1)


def test_tasks_are_spread_over_their_own_seeds():
    numbers = {A: [0.1, 0.4, 0.4], B: [0.8, 0.6]}
    found = per_task(values(numbers))
    for problem, column in numbers.items():
        assert found[problem].mean == pytest.approx(np.mean(column))
        assert found[problem].deviation == pytest.approx(np.std(column, ddof=1))
        assert found[problem].count == len(column)


def test_the_macro_average_is_taken_per_seed_first():
    """Both seeds average to 0.6, so that the macro average has no spread, though the four numbers have one of 0.26."""
    found = macro_average(values({A: [0.9, 0.5], B: [0.3, 0.7]}), [A, B])
    assert found.mean == pytest.approx(0.6)
    assert found.deviation == pytest.approx(0.0, abs=1e-15)  # rounding of two sums
    assert found.count == 2


def test_a_seed_without_one_of_the_tasks_does_not_count():
    """Otherwise the seed's average would be over easier tasks."""
    numbers = values({A: [0.9, 0.5], B: [0.3]})
    assert macro_by_seed(numbers, [A, B]) == pytest.approx({1: 0.6})
    assert macro_average(numbers, [A, B]) == Spread(pytest.approx(0.6), None, 1)
    assert macro_average(values({A: [0.9, 0.5]}), [A, B]) is None


def test_a_difference_is_paired_by_task_and_seed():
    """By hand: +0.1, 0, −0.2 and +0.3 over the four common draws; what only one of them has does not count."""
    ours = values({A: [0.6, 0.5, 0.9], B: [0.4, 0.8]})
    theirs = values({A: [0.5, 0.5], B: [0.6, 0.5, 0.1]})
    found = paired_difference(ours, theirs)
    assert found.mean == pytest.approx(0.05)
    assert (found.wins, found.ties, found.losses, found.pairs) == (2, 1, 1, 4)


def test_equal_accuracies_are_a_tie_however_they_were_computed():
    assert paired_difference(values({A: [0.1 + 0.2]}), values({A: [0.3]})).ties == 1


def test_no_common_draw_no_difference_and_one_pair_no_interval():
    assert paired_difference(values({A: [0.5]}), values({B: [0.5]})) is None
    assert paired_difference(values({A: [0.75]}), values({A: [0.5]})).interval is None


def exact_interval(differences: list[float]) -> tuple[float, float]:
    """The quantiles of the distribution of all nⁿ resamples, each of which is equally likely."""
    means = [np.mean(drawn) for drawn in product(differences, repeat=len(differences))]
    return tuple(np.percentile(means, [2.5, 97.5], method="inverted_cdf"))


@pytest.mark.parametrize("differences", [[-0.1, 0.3], [0.0, 0.1, 0.4], [-0.2, 0.0, 0.1, 0.3], [0.05] * 3])
def test_the_interval_is_that_of_all_resamples(differences):
    """Few pairs have so few different means that 10,000 resamples hit the very percentiles of the complete list."""
    found = paired_difference(values({A: differences}), values({A: [0.0] * len(differences)})).interval
    assert (found.low, found.high) == pytest.approx(exact_interval(differences), abs=1e-12)  # order of summation


def test_the_interval_of_many_pairs_is_that_of_drawn_indices():
    """Against indices drawn with another generator; the tolerance is three standard errors of both percentiles."""
    generator = np.random.default_rng(3)
    differences = generator.normal(0.02, 0.05, size=20)
    baseline = {A: [0.5] * 20}
    found = paired_difference(values({A: list(0.5 + differences)}), values(baseline)).interval
    means = differences[generator.integers(0, 20, size=(40_000, 20))].mean(axis=1)
    # A percentile p of n draws errs by √(p(1−p)/n) / density; a normal density at ±1.96 is 0.0584 / σ.
    error = 3 * np.sqrt(0.025 * 0.975 * (1 / 10_000 + 1 / 40_000)) / 0.0584 * means.std()
    assert (found.low, found.high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=error)


def test_the_interval_is_the_same_every_time():
    ours, theirs = values({A: [0.1, 0.5, 0.7, 0.2]}), values({A: [0.3, 0.1, 0.6, 0.2]})
    assert paired_difference(ours, theirs) == paired_difference(ours, theirs)


@pytest.mark.parametrize(("count", "sign"), [(FEWEST_PAIRS - 1, 0), (FEWEST_PAIRS, 1)])
def test_too_few_pairs_tell_nothing_apart(count, sign):
    """Five pairs that all win have an interval above zero, and still no 95 %."""
    found = paired_difference(values({A: [0.6] * count}), values({A: [0.5] * count}))
    assert found.interval.sign == 1
    assert found.sign == sign


@pytest.mark.parametrize(("interval", "sign"), [((0.1, 0.2), 1), ((-0.2, -0.1), -1), ((-0.1, 0.1), 0), ((0.0, 0.1), 0)])
def test_an_interval_excludes_zero_or_does_not(interval, sign):
    assert Interval(*interval).sign == sign


def test_ranks_share_their_places():
    """By hand: 0.9, 0.9, 0.5 have places 1.5, 1.5, 3; 0.2, 0.6, 0.4 have 3, 1, 2."""
    found = mean_ranks(
        {row("x"): values({A: [0.9, 0.2]}), row("y"): values({A: [0.9, 0.6]}), row("z"): values({A: [0.5, 0.4]})}
    )
    assert {key.name: rank.mean for key, rank in found.rows.items()} == {"x": 2.25, "y": 1.25, "z": 2.5}
    assert found.draws == 2
    # Two draws: a resample has either draw alone with probability 1/4 each, more than the 2.5 % cut off.
    assert found.rows[row("x")].interval == Interval(1.5, 3.0)


def test_ranks_are_over_the_draws_that_all_ranked_rows_have():
    """`late` has one of four draws and is not ranked; `failing` lacks one, which is then left out for all."""
    rows = {
        row("full"): values({A: [0.5, 0.5, 0.5, 0.1]}),
        row("failing"): values({A: [0.6, 0.6, 0.6]}),
        row("late"): values({A: [0.9]}),
    }
    found = mean_ranks(rows)
    assert found.draws == 3
    assert {key.name: rank.mean for key, rank in found.rows.items()} == {"full": 2.0, "failing": 1.0}
    assert found.left_out == (row("late"),)


@pytest.mark.parametrize("rows", [{}, {row("x"): {}}, {row("x"): values({A: [0.5]}), row("y"): values({B: [0.5]})}])
def test_rows_without_a_common_draw_are_not_ranked(rows):
    assert mean_ranks(rows) is None


@pytest.mark.parametrize(("device", "peak"), [("cpu", 500), ("NVIDIA H100", 900)])
def test_costs_are_means_and_the_memory_is_the_closest_bound(device, peak):
    """A process's peak only grows, so its first cell is the tightest bound; a GPU's is reset for every cell."""
    numbers = [(1.0, 0.2, 10, 90, 500), (3.0, 0.4, 30, 80, 900)]
    cells = [
        record(
            "x",
            {"prompt": with_accuracy(5, latency=latency, extra_tokens=extra)},
            seed=seed,
            fit_seconds=seconds,
            trainable_parameters=7,
            stored_bytes=stored,
            peak_memory_bytes=memory,
            versions={"device": device},
        )
        for seed, (seconds, latency, extra, stored, memory) in enumerate(numbers)
    ]
    found = cost(by_row(cells)[row("x")])
    assert found.fit_seconds.mean == pytest.approx(2.0)
    assert found.seconds_per_text.mean == pytest.approx(0.3)
    assert found.extra_tokens == pytest.approx(20.0)
    assert (found.trainable_parameters, found.stored_bytes, found.peak_memory_bytes) == (7, 90, peak)


def test_the_time_ratio_is_the_median_over_pairs():
    """A single slow cell does not change it; a baseline that fits nothing has no ratio."""
    right = with_accuracy(5)
    slow, plain = (
        by_row([record(name, {"prompt": right}, seed=seed, fit_seconds=time) for seed, time in enumerate(times)])[
            row(name)
        ]
        for name, times in (("x", [2.0, 3.0, 90.0]), ("y", [1.0, 2.0, 1.0]))
    )
    assert fit_time_ratio(slow, plain) == pytest.approx(2.0)
    assert fit_time_ratio(slow, outcomes("y", {("sst2", 0): right})) is None


def test_confusions_are_summed_over_seeds():
    first, second = score([0, 1, 1], [0, 0, 1]), score([1, 1, 0], [0, 1, 0])
    found = outcomes("x", {("a", 1): first, ("a", 2): second, ("b", 1): score([0], [1])})
    problem = next(draw.problem for draw in found if draw.problem.task == "a")
    assert confusion(found, problem).counts == ((2, 2), (0, 2))
    assert confusion(found, problem).labels == ("negative", "positive")
    assert confusion(found, Problem("c", 5, 500, "hash of c")) is None


def test_a_metric_is_read_by_draw():
    found = outcomes("x", {("a", 1): with_accuracy(7), ("b", 2): with_accuracy(3)})
    assert sorted(metric(found).values()) == [0.3, 0.7]
