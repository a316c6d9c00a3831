"""Render a report as one self-contained HTML page, with style, script and figures inside."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ofa.comparison.records import CONTEXTS
from ofa.files import Json
from ofa.report import background, tables, verdicts
from ofa.report.content import NORM_TUNING, OFA, Comparison, Content
from ofa.report.figures import figures, role
from ofa.report.formatting import moment
from ofa.report.statistics import Confusion


def page(content: Content) -> str:
    """The report as one HTML document. All text from the results is escaped."""
    environment = Environment(
        loader=PackageLoader("ofa.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["role"] = role
    return environment.get_template("page.html.j2").render(
        title=verdicts.title(content),
        progress=verdicts.progress(content),
        incomplete=any(one.gaps for one in content.comparisons) or content.waiting > 0,
        sections=[_section(comparison, place) for place, comparison in enumerate(content.comparisons, start=1)],
        not_in_paper=verdicts.NOT_IN_PAPER,
        no_command=verdicts.NO_COMMAND,
        nothing_to_compare=verdicts.NOTHING_TO_COMPARE,
        commands=content.commands,
        versions=background.versions(content),
        finished=moment(content.finished),
    )


def _section(comparison: Comparison, place: int) -> Json:
    """What the template shows of one model."""
    key = f"model-{place}"
    contrasts = [tables.differences(comparison, method) for method in (NORM_TUNING, OFA)]
    return {
        "id": key,
        "comparison": comparison,
        "subject": verdicts.subject(comparison),
        "best": verdicts.best(comparison),
        "glances": [tables.glance(comparison, context) for context in CONTEXTS if comparison.in_context(context)],
        "terms_told": verdicts.terms(comparison),
        "results": tables.results(comparison),
        "costs": tables.costs(comparison),
        "differences": [table for table in contrasts if table.rows],
        "figures": {
            drawn.name: {"title": drawn.title, "caption": drawn.caption, "svg": Markup(drawn.svg)}
            for drawn in figures(comparison, key)
        },
        "matrices": _matrices(comparison),
        "paper": background.paper(comparison),
        "gaps": background.gaps(comparison),
        "remarks": background.remarks(comparison),
    }


def _matrices(comparison: Comparison) -> list[tuple[str, list[tuple[str, Confusion]]]]:
    """Confusion matrices by task, each with its row's label, in the order of the tables."""
    by_task = []
    for problem in comparison.problems:
        lines = [line for line in comparison.lines if problem in line.confusions]
        if lines:
            by_task.append((comparison.names[problem], [(line.row.label, line.confusions[problem]) for line in lines]))
    return by_task
