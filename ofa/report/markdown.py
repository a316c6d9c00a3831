"""Render a report as Markdown: its sentences and tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from ofa.comparison.records import CONTEXTS
from ofa.report import background, tables, verdicts
from ofa.report.content import NORM_TUNING, OFA, Comparison, Content
from ofa.report.formatting import moment
from ofa.report.table import WITH, Entry, Table

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~$&])")


def markdown(content: Content) -> str:
    """The report as one Markdown document; figures and confusion matrices are in the HTML page."""
    parts = [f"# {_text(verdicts.title(content))}", f"{_text(verdicts.progress(content))}. Figures: report.html."]
    for comparison in content.comparisons:
        parts += _comparison(comparison)
    parts += ["## How it was run", *_commands(content), _table(background.versions(content))]
    if content.finished:
        parts.append(f"Last cell: {_text(moment(content.finished))}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _comparison(comparison: Comparison) -> Iterator[str]:
    yield f"## {_text(comparison.model)}"
    yield _text(verdicts.subject(comparison))
    yield "### Which method, at what cost"
    yield _list(verdicts.best(comparison))
    for context in CONTEXTS:
        if comparison.in_context(context):
            yield f"**{context_title(context)}**"
            yield _table(tables.glance(comparison, context))
    if terms := verdicts.terms(comparison):
        yield "### What OFA's terms add to norm tuning"
        yield _list(terms)
    yield "### All results"
    yield _table(tables.results(comparison))
    yield "### What they cost"
    yield _table(tables.costs(comparison))
    for method in (NORM_TUNING, OFA):
        differences = tables.differences(comparison, method)
        if differences.rows:
            yield f"### Against {method}"
            yield _table(differences)
    paper = background.paper(comparison)
    yield "### The paper's own results"
    yield _table(paper) if paper else verdicts.NOT_IN_PAPER
    gaps = background.gaps(comparison)
    if gaps.rows:
        yield "### Cells without a result"
        yield _table(gaps)
    remarks = background.remarks(comparison)
    if remarks.rows:
        yield "### Remarks"
        yield _table(remarks)


def context_title(context: str) -> str:
    """A context as a heading: `Without demonstrations in context`."""
    return f"{WITH[context].capitalize()} in context"


def _commands(content: Content) -> list[str]:
    if not content.commands:
        return [verdicts.NO_COMMAND]
    lines = "\n".join(content.commands)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", lines)), default=0))
    return [f"{fence}bash\n{lines}\n{fence}"]


def _table(table: Table) -> str:
    """A table and its notes; empty if it has no rows."""
    if not table.rows:
        return ""
    head = _row(_text(column.title) for column in table.columns)
    rule = _row("---:" if column.numeric else "---" for column in table.columns)
    lines = [head, rule, *(_row(_entry(entry) for entry in row) for row in table.rows)]
    return "\n".join(lines) + "".join(f"\n\n{_text(note)}" for note in table.notes)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _entry(entry: Entry) -> str:
    return f"**{_text(entry.text)}**" if entry.tone == "best" else _text(entry.text)


def _list(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {_text(sentence)}" for sentence in sentences)


def _text(text: str) -> str:
    """Escape text for Markdown and HTML, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
