"""Summarize a comparison in sentences: the best row and its significance, and the effect of OFA's terms."""

from __future__ import annotations

from collections.abc import Sequence

from ofa.comparison.records import CONTEXTS
from ofa.report import formatting as shown
from ofa.report.content import NORM_TUNING, OFA, Comparison, Content, Contrast, Line, Winner
from ofa.report.statistics import FEWEST_PAIRS
from ofa.report.table import WITH

NOT_IN_PAPER = "The paper has no known results for this model."
NOTHING_TO_COMPARE = "There are no two rows with a pair of task and seed in common."
NO_TERMS = f"The effect of OFA's terms is unknown: {NORM_TUNING} and {OFA} have no pair of task and seed in common."
NO_COMMAND = "The folder does not record its command."

_MOST_NAMES = 4


def title(content: Content) -> str:
    """The title of the report: methods, tasks, models."""
    methods = {line.row.method for one in content.comparisons for line in one.lines}
    tasks = sorted({problem.task for one in content.comparisons for problem in one.problems})
    where = shown.listed(tasks) if len(tasks) <= _MOST_NAMES else shown.plural(len(tasks), "task")
    models = f", {len(content.comparisons)} models" if len(content.comparisons) > 1 else ""
    return f"{shown.plural(len(methods), 'method')} on {where}{models}"


def subject(comparison: Comparison) -> str:
    """The subject of a comparison: model, tasks, shots, seeds, test examples."""
    shots = sorted({problem.shots for problem in comparison.problems})
    tests = sorted(set(comparison.tested.values()) or {problem.test_size for problem in comparison.problems})
    seeds = [str(seed) for seed in comparison.seeds]
    return " · ".join(
        (
            comparison.model,
            shown.plural(len(comparison.problems), "task"),
            f"{_range(shots)} {'shot' if shots == [1] else 'shots'} per class",
            f"{'seed' if len(seeds) == 1 else 'seeds'} {shown.listed(seeds)}",
            f"{_range(tests)} test texts per task",
        )
    )


def progress(content: Content) -> str:
    """The number of cells, and of cells without a result."""
    gaps = [gap for comparison in content.comparisons for gap in comparison.gaps]
    failed = sum(gap.error is not None for gap in gaps)
    absent = len(gaps) - failed + content.waiting
    cells = sum(comparison.cells for comparison in content.comparisons) + content.waiting
    told = [f"{cells - failed - absent:,} of {shown.plural(cells, 'cell')} finished"]
    told += [f"{failed:,} failed"] if failed else []
    told += [f"{absent:,} not run"] if absent else []
    return ", ".join(told)


def best(comparison: Comparison) -> list[str]:
    """One sentence per context: the highest macro average, and the rows not significantly below it."""
    winners = [comparison.winner(context) for context in CONTEXTS]
    told = [_best(winner) for winner in winners if winner is not None]
    return told or ["No method has a result on every task yet, so there is no average to compare."]


def terms(comparison: Comparison) -> list[str]:
    """The effect of `ofa` against norm tuning, by context and in time, or why it is unknown; empty without both."""
    lines = [line for line in comparison.lines if line.row.method == OFA and NORM_TUNING in line.contrasts]
    contrasts = {line.row.context: line.contrasts[NORM_TUNING] for line in lines if not line.row.settings}
    if not contrasts:
        compared = {NORM_TUNING, OFA} <= {line.row.method for line in comparison.lines}
        return [_settings(lines)] if lines else [NO_TERMS] if compared else []
    told = [_term(contrasts[context], context) for context in CONTEXTS if context in contrasts]
    sentences = [f"With OFA's terms, norm tuning {shown.listed(told)}."]
    time = next((contrast.fit_time for contrast in contrasts.values() if contrast.fit_time), None)
    if time is not None:
        sentences.append(f"Fitting takes {time:.2f} times as long.")
    return sentences


def _settings(lines: Sequence[Line]) -> str:
    """How many settings of OFA differ significantly from norm tuning, if none has the default weights."""
    told = []
    for context in CONTEXTS:
        signs = [line.contrasts[NORM_TUNING].difference.sign for line in lines if line.row.context == context]
        if signs:
            told.append(f"{WITH[context]} {signs.count(1)} better and {signs.count(-1)} worse of {len(signs)}")
    return f"Settings of OFA that differ significantly from {NORM_TUNING}: {', '.join(told)}."


def _best(winner: Winner) -> str:
    line = winner.line
    score = shown.percent_spread(line.macro)
    where = WITH[line.row.context]
    first = f"Highest {where}: {line.row.name}, {score} %"
    if not winner.others:
        return f"{first}, the only row with every task."
    if len(line.accuracy) < FEWEST_PAIRS:
        return f"{first}; {shown.plural(len(line.accuracy), 'pair')} of task and seed cannot tell rows apart."
    near = [other.row.name for other in winner.not_told_apart]
    if not near:
        others = "the other row" if winner.others == 1 else f"all {winner.others} other rows"
        return f"{first}, significantly better than {others}."
    named = near if len(near) <= _MOST_NAMES else [*near[: _MOST_NAMES - 1], f"{len(near) - _MOST_NAMES + 1} more"]
    return f"{first}; not significantly better than {shown.listed(named)}."


def _term(contrast: Contrast, context: str) -> str:
    difference = contrast.difference
    amount = (
        f"{shown.points(abs(difference.mean)).lstrip('+')} points {shown.points_interval(difference.interval)}".strip()
    )
    verb = {1: "gains", -1: "loses"}.get(difference.sign)
    if verb is None:
        signed = f"{shown.points(difference.mean)} points {shown.points_interval(difference.interval)}".strip()
        return f"changes by {signed} {WITH[context]} (not significant)"
    return f"{verb} {amount} {WITH[context]}"


def _range(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"
