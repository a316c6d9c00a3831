"""Compute the content of a report: rows, their differences and costs, failures and gaps, commands and versions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ofa.comparison.outcomes import (
    Draw,
    Outcome,
    Problem,
    Row,
    baseline_of,
    by_row,
    draw_of,
    metric,
    row_of,
)
from ofa.comparison.records import Cell, Record
from ofa.report.runs import NO_RUNS, Runs
from ofa.report.statistics import (
    Confusion,
    Cost,
    Difference,
    Rank,
    Ranks,
    Spread,
    confusion,
    cost,
    fit_time_ratio,
    macro_average,
    macro_by_seed,
    mean_ranks,
    paired_difference,
    per_task,
)

NORM_TUNING, OFA = "norm-tuning", "ofa"

_TIMED_ON = ("device", "threads")


@dataclass(frozen=True)
class Contrast:
    """A row against a baseline, over the draws of shots that both finished."""

    baseline: Row
    difference: Difference
    fit_time: float | None


@dataclass(frozen=True)
class Line:
    """One row of the tables. If no cell finished, it has no numbers and no cost."""

    row: Row
    macro: Spread | None
    macro_f1: Spread | None
    tasks: Mapping[Problem, Spread]
    accuracy: Mapping[Draw, float]
    by_seed: Mapping[int, float]
    contrasts: Mapping[str, Contrast]
    rank: Rank | None
    cost: Cost | None
    confusions: Mapping[Problem, Confusion]


@dataclass(frozen=True)
class Gap:
    """A cell without a result: it failed with `error`, or (None) was not run."""

    name: str
    draw: Draw
    key: str
    error: str | None


@dataclass(frozen=True)
class Winner:
    """The line with the highest macro average of a context, and the lines without a significant difference to it."""

    line: Line
    others: int
    not_told_apart: tuple[Line, ...]


@dataclass(frozen=True)
class Comparison:
    """All rows of one model, best macro average first; rows without one come last.

    `tested` is the number of test examples of each task with a result, `machines` the number of distinct devices and
    thread counts that finished cells were timed on; `remarks` maps each warning to the rows of its cells.
    """

    model: str
    problems: tuple[Problem, ...]
    seeds: tuple[int, ...]
    draws: tuple[Draw, ...]
    lines: tuple[Line, ...]
    ranks: Ranks | None
    gaps: tuple[Gap, ...]
    cells: int
    tested: Mapping[Problem, int]
    machines: int
    remarks: Mapping[str, Sequence[str]]

    @cached_property
    def names(self) -> Mapping[Problem, str]:
        """A name for every task; tasks of the same name are distinguished by shots, test size or file."""
        forms = Counter(problem.task for problem in self.problems)
        return {
            problem: _distinct(problem, self.problems) if forms[problem.task] > 1 else problem.task
            for problem in self.problems
        }

    def in_context(self, context: str) -> list[Line]:
        """The lines of one context whose macro average has the most seeds, best first; the others are not ranked."""
        counts = {line.row: line.macro.count for line in self.lines if line.row.context == context and line.macro}
        most = max(counts.values(), default=0)
        return [line for line in self.lines if counts.get(line.row) == most]

    def winner(self, context: str) -> Winner | None:
        """The best line of a context; None if no line has every task."""
        lines = self.in_context(context)
        if not lines:
            return None
        best, *others = lines
        leads = [paired_difference(best.accuracy, other.accuracy) for other in others]
        near = [other for other, lead in zip(others, leads, strict=True) if lead is None or lead.sign <= 0]
        return Winner(best, len(others), tuple(near))

    def named(self, name: str, context: str) -> Line | None:
        """The line of a method with its settings, in one context."""
        return next((line for line in self.lines if (line.row.name, line.row.context) == (name, context)), None)


@dataclass(frozen=True)
class Content:
    """The content of a report.

    `versions` has each set of versions with its number of cells, `finished` is the last cell's time, `waiting` counts
    requested cells that have neither a record nor a gap yet.
    """

    comparisons: tuple[Comparison, ...]
    versions: tuple[tuple[Mapping[str, str], int], ...]
    finished: str
    commands: tuple[str, ...]
    waiting: int


def build(records: Sequence[Record], runs: Runs = NO_RUNS) -> Content:
    """The content of a report, from one record per cell and the notes of the runs.

    Raises:
        InputError: a finished cell has no accuracy.
    """
    models: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        models[record.cell.model].append(record)
    comparisons = tuple(_comparison(model, of_model) for model, of_model in models.items())
    told = {record.cell.key for record in records} | {gap.key for one in comparisons for gap in one.gaps}
    versions = Counter(tuple(sorted(record.versions.items())) for record in records)
    return Content(
        comparisons=comparisons,
        versions=tuple((dict(found), count) for found, count in versions.most_common()),
        finished=max((record.finished for record in records), default=""),
        commands=runs.commands,
        waiting=len(runs.cells - told),
    )


def _comparison(model: str, records: Sequence[Record]) -> Comparison:
    rows = by_row(records)
    draws = tuple(sorted({draw_of(record) for record in records}))
    problems = tuple(sorted({draw.problem for draw in draws}))
    accuracy = {row: metric(outcomes) for row, outcomes in rows.items()}
    ranks = mean_ranks(accuracy)
    lines = [_line(row, rows, accuracy, problems, ranks) for row in rows]
    lines += [_empty(row) for row in _without_result(records)]
    gaps = _gaps(records, draws)
    return Comparison(
        model=model,
        problems=problems,
        seeds=tuple(sorted({draw.seed for draw in draws})),
        draws=draws,
        lines=tuple(sorted(lines, key=_order)),
        ranks=ranks,
        gaps=gaps,
        cells=len(records) + sum(gap.error is None for gap in gaps),
        tested={
            draw.problem: len(outcome.score.truth) for outcomes in rows.values() for draw, outcome in outcomes.items()
        },
        machines=len({tuple(map(record.versions.get, _TIMED_ON)) for record in records if record.done}),
        remarks=_remarks(records),
    )


def _line(
    row: Row,
    rows: Mapping[Row, Mapping[Draw, Outcome]],
    accuracy: Mapping[Row, Mapping[Draw, float]],
    problems: Sequence[Problem],
    ranks: Ranks | None,
) -> Line:
    outcomes = rows[row]
    has_f1 = all("macro_f1" in outcome.score.metrics for outcome in outcomes.values())
    matrices = {problem: confusion(outcomes, problem) for problem in problems}
    return Line(
        row=row,
        macro=macro_average(accuracy[row], problems),
        macro_f1=macro_average(metric(outcomes, "macro_f1"), problems) if has_f1 else None,
        tasks=per_task(accuracy[row]),
        accuracy=accuracy[row],
        by_seed=macro_by_seed(accuracy[row], problems),
        contrasts=_contrasts(row, rows, accuracy),
        rank=ranks.rows.get(row) if ranks else None,
        cost=cost(outcomes),
        confusions={problem: matrix for problem, matrix in matrices.items() if matrix},
    )


def _contrasts(
    row: Row, rows: Mapping[Row, Mapping[Draw, Outcome]], accuracy: Mapping[Row, Mapping[Draw, float]]
) -> dict[str, Contrast]:
    """The row against norm tuning and against OFA, if they exist and are not the row itself."""
    found = {}
    for method in (NORM_TUNING, OFA):
        baseline = baseline_of(row, rows, method)
        if baseline is None or baseline == row:
            continue
        difference = paired_difference(accuracy[row], accuracy[baseline])
        if difference is not None:
            found[method] = Contrast(baseline, difference, fit_time_ratio(rows[row], rows[baseline]))
    return found


def _without_result(records: Iterable[Record]) -> list[Row]:
    """Rows without a result in any cell; the tables still list them."""
    records = list(records)
    finished = {record.cell.row for record in records if record.scores}
    rows = {record.cell.row: row_of(record, "prompt") for record in records if record.cell.row not in finished}
    return list(rows.values())


def _empty(row: Row) -> Line:
    return Line(row, None, None, {}, {}, {}, {}, None, None, {})


def _gaps(records: Iterable[Record], draws: Iterable[Draw]) -> tuple[Gap, ...]:
    """Failed cells, and draws that other methods have run but this one has not."""
    by_name: dict[str, dict[Draw, Record]] = defaultdict(dict)
    for record in records:
        by_name[record.cell.row][draw_of(record)] = record
    gaps = []
    for name, there in by_name.items():
        for draw in draws:
            if draw not in there:
                gaps.append(Gap(name, draw, _cell_at(next(iter(there.values())).cell, draw).key, None))
            elif not there[draw].done:
                gaps.append(Gap(name, draw, there[draw].cell.key, there[draw].error))
    return tuple(gaps)


def _remarks(records: Iterable[Record]) -> dict[str, list[str]]:
    """The warnings in the cells' notes, each with the rows of its cells."""
    told: dict[str, list[str]] = defaultdict(list)
    for record in records:
        warnings = [*record.notes.get("warnings", ())]
        warnings += ["texts were cut to fit the model's window"] if record.notes.get("truncated_texts") else []
        warnings += ["the prompts were turns of the model's chat template"] if record.notes.get("chat") else []
        for warning in warnings:
            told[str(warning)].append(record.cell.row)
    return dict(told)


def _cell_at(cell: Cell, draw: Draw) -> Cell:
    """The cell of the same method at another draw."""
    problem = draw.problem
    return replace(
        cell,
        task=problem.task,
        task_sha256=problem.task_sha256,
        shots=problem.shots,
        test_size=problem.test_size,
        seed=draw.seed,
    )


def _order(line: Line) -> tuple[bool, float, float, str]:
    known = line.macro.mean if line.macro else 0.0
    mean = sum(line.accuracy.values()) / len(line.accuracy) if line.accuracy else 0.0
    return (line.macro is None, -known, -mean, line.row.label)


def _distinct(problem: Problem, problems: Iterable[Problem]) -> str:
    same = [other for other in problems if other.task == problem.task]
    parts = []
    if len({other.shots for other in same}) > 1:
        parts.append(f"{problem.shots} {'shot' if problem.shots == 1 else 'shots'}")
    if len({other.test_size for other in same}) > 1:
        parts.append(f"{problem.test_size} tests")
    if len({other.task_sha256 for other in same}) > 1:
        parts.append(f"file {problem.task_sha256[:6]}")
    return f"{problem.task} ({', '.join(parts)})"
