"""Statistics of a comparison's records: spreads over seeds, averages over tasks, paired differences, ranks, costs.

Pure functions of records; accuracies and their differences are shares between 0 and 1. All methods get the same draws
of shots, so every comparison of two rows is paired by `Draw`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ofa.comparison.outcomes import Draw, Outcome, Problem, Row

RESAMPLES = 10_000
CONFIDENCE = 0.95
FEWEST_PAIRS = 6
"""With fewer pairs no percentile interval reaches 95 %: [smallest, largest] of n values misses their median with
probability 2^(1−n), 6 % for five values and 3 % for six."""

_EQUAL = 1e-12  # accuracies are quotients of small integers: closer numbers are equal


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n − 1) of `count` numbers; one number has no deviation."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval of 95 %."""

    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 above zero, −1 below zero, 0 if zero is inside."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Difference:
    """A row minus its baseline over the draws that both finished; `interval` is None for a single pair."""

    mean: float
    interval: Interval | None
    wins: int
    ties: int
    losses: int

    @property
    def pairs(self) -> int:
        """The number of draws that both rows finished."""
        return self.wins + self.ties + self.losses

    @property
    def sign(self) -> int:
        """1 or −1 if the interval excludes zero and has enough pairs, else 0: not significant."""
        return self.interval.sign if self.interval and self.pairs >= FEWEST_PAIRS else 0


@dataclass(frozen=True)
class Rank:
    """Mean rank of a row (1 is best, ties share their mean rank) and its interval over the draws."""

    mean: float
    interval: Interval | None


@dataclass(frozen=True)
class Ranks:
    """Mean ranks over the `draws` that all ranked rows finished; `left_out` rows finished less than half of them."""

    rows: Mapping[Row, Rank]
    draws: int
    left_out: tuple[Row, ...]


@dataclass(frozen=True)
class Cost:
    """The cost of a row over its finished cells; see `cost`."""

    fit_seconds: Spread
    seconds_per_text: Spread
    extra_tokens: float
    trainable_parameters: int
    stored_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class Confusion:
    """Test examples summed over seeds: `counts[i][j]` of label i were predicted as label j."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


def spread(numbers: Iterable[float]) -> Spread:
    """Mean ± sample standard deviation of at least one number."""
    values = np.asarray(list(numbers), dtype=np.float64)
    deviation = float(values.std(ddof=1)) if values.size > 1 else None
    return Spread(float(values.mean()), deviation, int(values.size))


def per_task(values: Mapping[Draw, float]) -> dict[Problem, Spread]:
    """Mean ± standard deviation over the seeds of each task."""
    groups: dict[Problem, list[float]] = defaultdict(list)
    for draw, value in values.items():
        groups[draw.problem].append(value)
    return {problem: spread(group) for problem, group in groups.items()}


def macro_by_seed(values: Mapping[Draw, float], problems: Sequence[Problem]) -> dict[int, float]:
    """The mean over all `problems`, for each seed that has every one of them."""
    seeds = sorted({draw.seed for draw in values})
    whole = [seed for seed in seeds if all(Draw(problem, seed) in values for problem in problems)]
    return {seed: sum(values[Draw(problem, seed)] for problem in problems) / len(problems) for seed in whole}


def macro_average(values: Mapping[Draw, float], problems: Sequence[Problem]) -> Spread | None:
    """Macro average over tasks: per seed first, then mean ± standard deviation over the seeds that have every task.

    So the deviation is of the reported average, not of single tasks. None without such a seed.
    """
    averages = macro_by_seed(values, problems)
    return spread(averages.values()) if averages else None


def paired_difference(values: Mapping[Draw, float], baseline: Mapping[Draw, float]) -> Difference | None:
    """`values` − `baseline` over the draws both have, with a percentile bootstrap interval; None without a common draw.

    The bootstrap resamples pairs, one for each (task, seed). The interval asks whether the difference would recur with
    other shots on similar tasks: a pair varies with the draw of shots and with the method's effect on its task. Pairs
    of one task are correlated, so the interval is for this mixture of tasks. Resampling seeds within tasks would omit
    the variance between tasks and, with three seeds, be too narrow by a third of the variance; resampling whole tasks
    needs more tasks than a comparison has.
    """
    common = sorted(values.keys() & baseline.keys())
    if not common:
        return None
    differences = np.array([values[draw] - baseline[draw] for draw in common])
    wins, losses = int((differences > _EQUAL).sum()), int((differences < -_EQUAL).sum())
    interval = None
    if len(common) > 1:
        interval = _percentile_interval(_resampled_means(differences[:, None])[:, 0])
    return Difference(float(differences.mean()), interval, wins, len(common) - wins - losses, losses)


def mean_ranks(rows: Mapping[Row, Mapping[Draw, float]]) -> Ranks | None:
    """Mean rank of every row over the draws that all ranked rows finished, with a bootstrap interval over those draws.

    Rows that finished less than half of all draws are not ranked: they would leave too few common draws. None if there
    is no common draw.
    """
    everything = {draw for values in rows.values() for draw in values}
    ranked = [row for row, values in rows.items() if values and 2 * len(values) >= len(everything)]
    common = sorted(set.intersection(*(set(rows[row]) for row in ranked))) if ranked else []
    if not common:
        return None
    ranks = np.array([descending_ranks([rows[row][draw] for row in ranked]) for draw in common])
    intervals: list[Interval | None] = [None] * len(ranked)
    if len(common) > 1:
        means = _resampled_means(ranks)
        intervals = [_percentile_interval(means[:, index]) for index in range(len(ranked))]
    found = {row: Rank(float(ranks[:, index].mean()), intervals[index]) for index, row in enumerate(ranked)}
    return Ranks(found, len(common), tuple(row for row in rows if row not in found))


def descending_ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Ranks by descending value, 1 for the largest; ties share their mean rank."""
    numbers = np.asarray(values)
    above = (numbers[None, :] > numbers[:, None] + _EQUAL).sum(axis=1)
    equal = (np.abs(numbers[None, :] - numbers[:, None]) <= _EQUAL).sum(axis=1)
    places: NDArray[np.float64] = above + (equal + 1) / 2
    return places


def cost(outcomes: Mapping[Draw, Outcome]) -> Cost:
    """Costs over a row's cells: means of seconds and tokens, maxima of parameters and stored bytes.

    On a GPU, a record has the peak memory of its own cell, and the largest counts. On a CPU, it has the peak of the
    worker process, earlier cells included: each cell gives an upper bound, and the smallest is the tightest.
    """
    records = [outcome.record for outcome in outcomes.values()]
    scores = [outcome.score for outcome in outcomes.values()]
    closest = min if any(record.versions.get("device", "cpu") == "cpu" for record in records) else max
    return Cost(
        fit_seconds=spread(record.fit_seconds for record in records),
        seconds_per_text=spread(score.seconds_per_text for score in scores),
        extra_tokens=spread(score.extra_tokens for score in scores).mean,
        trainable_parameters=max(record.trainable_parameters for record in records),
        stored_bytes=max(record.stored_bytes for record in records),
        peak_memory_bytes=closest(record.peak_memory_bytes for record in records),
    )


def fit_time_ratio(outcomes: Mapping[Draw, Outcome], baseline: Mapping[Draw, Outcome]) -> float | None:
    """Median over the common draws of a row's fit seconds relative to its baseline's; None if the baseline has none."""
    pairs = [(outcomes[draw].record, baseline[draw].record) for draw in outcomes.keys() & baseline.keys()]
    ratios = [record.fit_seconds / other.fit_seconds for record, other in pairs if other.fit_seconds > 0]
    return float(np.median(ratios)) if ratios else None


def confusion(outcomes: Mapping[Draw, Outcome], problem: Problem) -> Confusion | None:
    """A row's confusion matrix on one task, summed over its seeds; None if there is none."""
    scores = [outcome.score for draw, outcome in outcomes.items() if draw.problem == problem]
    matrices = [score.metrics["confusion"] for score in scores if "confusion" in score.metrics]
    if not matrices:
        return None
    summed = np.sum(np.asarray(matrices, dtype=np.int64), axis=0)
    return Confusion(tuple(scores[0].metrics["labels"]), tuple(tuple(row) for row in summed.tolist()))


def _resampled_means(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means (RESAMPLES, k) of the columns of an (n, k) array, rows drawn n times with replacement."""
    means: NDArray[np.float64] = _weights(len(columns)) @ columns
    return means


@lru_cache(maxsize=4)
def _weights(count: int) -> NDArray[np.float64]:
    """The weight of each of `count` rows in each resample; cached, since all rows of a table have the same pairs."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count


def _percentile_interval(means: NDArray[np.float64]) -> Interval:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    # Sums in another order may turn a zero difference into 1e-18.
    return Interval(_rounded_to_zero(low), _rounded_to_zero(high))


def _rounded_to_zero(value: float) -> float:
    return 0.0 if abs(value) < _EQUAL else float(value)
