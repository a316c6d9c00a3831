"""Build the secondary tables: cells without a result, warnings, the paper's results, versions."""

from __future__ import annotations

from collections import defaultdict

from ofa.comparison.outcomes import Draw
from ofa.comparison.records import CONTEXTS
from ofa.report import formatting as shown
from ofa.report.content import Comparison, Content
from ofa.report.paper import PaperResult, paper_results
from ofa.report.statistics import Spread
from ofa.report.table import METHOD, WITH, Column, Entry, Table, spread_entry


def gaps(comparison: Comparison) -> Table:
    """Cells without a result: a row for each method, task and error, and one for cells not run."""
    method, task, seeds, what = (Column(title, numeric=False) for title in ("method", "task", "seeds", "what happened"))
    groups: dict[tuple[str, str, str], list[Draw]] = defaultdict(list)
    for gap in comparison.gaps:
        name = comparison.names[gap.draw.problem]
        groups[gap.name, name, f"failed: {gap.error}" if gap.error is not None else "not run"].append(gap.draw)
    rows = [
        (
            Entry(row, row),
            Entry(name, name),
            Entry(", ".join(str(draw.seed) for draw in draws), draws[0].seed),
            Entry(str(len(draws)), len(draws)),
            Entry(told, told),
        )
        for (row, name, told), draws in groups.items()
    ]
    return Table("cells without a result", (method, task, seeds, Column("cells"), what), tuple(rows))


def remarks(comparison: Comparison) -> Table:
    """The distinct warnings of methods, each with its rows and its number of cells."""
    columns = (Column("methods", numeric=False), Column("cells"), Column("remark", numeric=False))
    rows = [
        (
            Entry(shown.listed(list(dict.fromkeys(names))), names[0]),
            Entry(str(len(names)), len(names)),
            Entry(text, text),
        )
        for text, names in comparison.remarks.items()
    ]
    return Table("remarks", columns, tuple(rows))


def paper(comparison: Comparison) -> Table | None:
    """The paper's results beside ours, in both contexts; None if the paper has none for this model."""
    known = paper_results(comparison.model)
    if known is None or not known.results:
        return None
    columns = (
        Column("task", numeric=False),
        METHOD,
        Column("demonstrations in context", "as the paper has it", numeric=False),
        Column("paper, %"),
        *(Column(f"here {WITH[context]}, %") for context in CONTEXTS),
    )
    told = {"prompt": "without", "demonstrations": "with", None: "not stated"}
    rows = [
        (
            Entry(result.task, result.task),
            Entry(result.method, result.method),
            Entry(told[result.context], told[result.context]),
            Entry(f"{100 * result.accuracy:.4g}", result.accuracy),
            *(spread_entry(_here(comparison, result, context), 0) for context in CONTEXTS),
        )
        for result in known.results
    ]
    sources = dict.fromkeys(result.source for result in known.results)
    return Table(f"{known.model} in the paper", columns, tuple(rows), (known.citation + ".", known.protocol, *sources))


def versions(content: Content) -> Table:
    """The versions that made the cells, one column for each distinct set."""
    sets = content.versions
    names = sorted({name for found, _ in sets for name in found})
    columns = (
        Column("component", numeric=False),
        *(Column(shown.plural(count, "cell"), numeric=False) for _, count in sets),
    )
    rows = [(Entry(name), *(Entry(found.get(name, shown.NOTHING)) for found, _ in sets)) for name in names]
    return Table("versions", columns, tuple(rows))


def _here(comparison: Comparison, result: PaperResult, context: str) -> Spread | None:
    """Our result on the task of a result of the paper."""
    line = comparison.named(result.method, context)
    tasks = line.tasks if line else {}
    return next((spread for problem, spread in tasks.items() if problem.task == result.task), None)
