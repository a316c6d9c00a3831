"""Build the tables of results: overview, all results, costs, differences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ofa.comparison.outcomes import Problem, Row
from ofa.comparison.records import CONTEXTS
from ofa.report import formatting as shown
from ofa.report.content import NORM_TUNING, OFA, Comparison, Contrast, Line
from ofa.report.statistics import FEWEST_PAIRS
from ofa.report.table import METHOD, WITH, Column, Entry, Table, spread_entry

_GLANCE = 5
"""Rows of the overview."""


_MACRO = Column("accuracy", "macro average in %: mean over tasks per seed, then mean ± standard deviation over seeds")
_FIT = Column("fit", "mean seconds to adapt to one task", less=True)
_LATENCY = Column("per text", "mean seconds to label one text", less=True)
_TRAINED = Column("trained", "parameters that are trained", less=True)
_STORED = Column("stored", "size of an adapter, without the shots", less=True)


def glance(comparison: Comparison, context: str) -> Table:
    """The best rows of a context and their costs, always with norm tuning and OFA."""
    lines = comparison.in_context(context)
    chosen = [line for place, line in enumerate(lines) if place < _GLANCE or line.row.name in (NORM_TUNING, OFA)]
    rows = []
    for line in chosen:
        macro = _macro(line, comparison, best=line is lines[0])
        rows.append((_name(line.row, short=True), macro, *_costs(line)[:4]))
    left = len(lines) - len(chosen)
    notes = (f"{left} more in the table of all results.",) if left else ()
    return Table(WITH[context], (METHOD, _MACRO, _FIT, _LATENCY, _TRAINED, _STORED), tuple(rows), notes)


def results(comparison: Comparison) -> Table:
    """Every row: macro average, each task, rank, and its number of finished cells."""
    names = comparison.names
    columns = (
        METHOD,
        _MACRO,
        *(
            Column(names[problem], "accuracy in %: mean ± standard deviation over seeds")
            for problem in comparison.problems
        ),
        Column("macro-F1", "in %, averaged like the accuracy"),
        Column("rank", "mean rank: 1 is best; ties share their mean rank", less=True),
        Column("cells", "finished, of the draws that any method was given"),
    )
    best = {context: _best_by_task(comparison, context) for context in CONTEXTS}
    seeds = Counter(draw.problem for draw in comparison.draws)
    winners = [comparison.in_context(context)[:1] for context in CONTEXTS]
    rows = []
    for line in comparison.lines:
        tasks = [
            spread_entry(line.tasks.get(problem), seeds[problem], best[line.row.context].get(problem))
            for problem in comparison.problems
        ]
        rank = Entry(f"{line.rank.mean:.1f}", line.rank.mean) if line.rank else Entry(shown.NOTHING)
        macro = _macro(line, comparison, best=[line] in winners)
        f1 = spread_entry(line.macro_f1, len(comparison.seeds))
        rows.append((_name(line.row), macro, *tasks, f1, rank, _cells(line, comparison)))
    return Table("accuracy", columns, tuple(rows), _result_notes(comparison))


def costs(comparison: Comparison) -> Table:
    """The cost of every row."""
    columns = (
        METHOD,
        _MACRO,
        _FIT,
        _LATENCY,
        _TRAINED,
        _STORED,
        Column("extra tokens", "mean tokens in front of every prompt", less=True),
        Column("memory", "on a GPU the largest peak of its cells; on a CPU an upper bound, see below", less=True),
    )
    rows = [(_name(line.row), _macro(line, comparison), *_costs(line)) for line in comparison.lines if line.cost]
    notes = [
        "Seconds are means over tasks and seeds; a fit serves both contexts. Memory on a CPU is the peak of the worker "
        "process when it finished the cell, earlier cells included: an upper bound."
    ]
    if comparison.machines > 1:
        notes.append(
            f"The cells were timed on {comparison.machines} different devices or thread counts: do not compare seconds "
            "of rows that ran on different ones."
        )
    return Table("cost", columns, tuple(rows), tuple(notes))


def differences(comparison: Comparison, method: str) -> Table:
    """Every row against the row of `method` in the same context."""
    columns = (
        METHOD,
        Column("difference", "mean over (task, seed), in points of accuracy"),
        Column("95 %", "bootstrap over (task, seed): other shots, similar tasks"),
        Column("wins", "(task, seed) pairs in which it is better"),
        Column("ties"),
        Column("losses", less=True),
        Column("time to fit", "median over the pairs, relative to the baseline", less=True),
    )
    rows = []
    for line in comparison.lines:
        contrast = line.contrasts.get(method)
        if contrast is not None:
            rows.append((_name(line.row), *_difference(contrast)))
    return Table(f"against {method}", columns, tuple(rows), _few(comparison) if rows else ())


def _name(row: Row, *, short: bool = False) -> Entry:
    return Entry(row.name if short else row.label, row.label, row=row)


def _macro(line: Line, comparison: Comparison, *, best: bool = False) -> Entry:
    return spread_entry(line.macro, len(comparison.seeds), line.macro.mean if best and line.macro else None)


def _best_by_task(comparison: Comparison, context: str) -> dict[Problem, float]:
    """The highest mean of each task among the rows with the most seeds, for tasks with several such rows."""
    best = {}
    for problem in comparison.problems:
        found = [
            line.tasks[problem] for line in comparison.lines if line.row.context == context and problem in line.tasks
        ]
        most = max((spread.count for spread in found), default=0)
        means = [spread.mean for spread in found if spread.count == most]
        if len(means) > 1:
            best[problem] = max(means)
    return best


def _cells(line: Line, comparison: Comparison) -> Entry:
    finished, expected = len(line.accuracy), len(comparison.draws)
    return Entry(f"{finished}/{expected}", finished, "" if finished == expected else "down")


def _costs(line: Line) -> tuple[Entry, ...]:
    if line.cost is None:
        return (Entry(shown.NOTHING),) * 6
    cost = line.cost
    memory = cost.peak_memory_bytes
    return (
        Entry(shown.seconds(cost.fit_seconds.mean), cost.fit_seconds.mean),
        Entry(shown.seconds(cost.seconds_per_text.mean), cost.seconds_per_text.mean),
        Entry(shown.integer(cost.trainable_parameters), cost.trainable_parameters),
        Entry(shown.size(cost.stored_bytes), cost.stored_bytes),
        Entry(shown.integer(cost.extra_tokens), cost.extra_tokens),
        Entry(shown.size(memory), memory) if memory else Entry(shown.NOTHING),
    )


def _difference(contrast: Contrast) -> tuple[Entry, ...]:
    difference, interval, time = contrast.difference, contrast.difference.interval, contrast.fit_time
    return (
        Entry(shown.points(difference.mean), difference.mean, {1: "up", -1: "down", 0: "muted"}[difference.sign]),
        Entry(shown.points_interval(interval), interval.low) if interval else Entry(shown.NOTHING),
        *(Entry(str(count), count) for count in (difference.wins, difference.ties, difference.losses)),
        Entry(shown.ratio(time), time) if time is not None else Entry(shown.NOTHING),
    )


def _few(comparison: Comparison) -> tuple[str, ...]:
    if len(comparison.draws) >= FEWEST_PAIRS:
        return ()
    return (
        f"With {shown.plural(len(comparison.draws), 'pair')} of task and seed no interval holds 95 %: at least "
        f"{FEWEST_PAIRS} are needed to tell two rows apart.",
    )


def _result_notes(comparison: Comparison) -> tuple[str, ...]:
    notes = [
        "Accuracy in %, mean ± standard deviation over seeds; the first column is the average over tasks. Bold: the "
        "best of its context."
    ]
    if any(len(line.accuracy) < len(comparison.draws) for line in comparison.lines):
        notes.append(
            "In brackets: the number of seeds, if some are missing. An average uses only the seeds that have every "
            "task, so such rows have other tasks or seeds than the rest."
        )
    if any(line.row.settings for line in comparison.lines):
        notes.append(
            "Settings are ordered by their results on these test texts: the best of several is selected on them, and "
            "will be worse on other texts."
        )
    ranks = comparison.ranks
    if ranks is not None:
        left_out: Sequence[Row] = ranks.left_out
        told = f"; not ranked, with less than half of them: {shown.listed([row.label for row in left_out])}"
        notes.append(
            f"Ranks are over the {shown.plural(ranks.draws, 'pair')} of task and seed that every ranked row finished"
            f"{told if left_out else ''}."
        )
    return tuple(notes)
