"""`ofa report`: write a comparison's results as Markdown and as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ofa.commands.console import notice, show, show_json
from ofa.commands.options import JsonOption, command
from ofa.comparison.records import CONTEXTS

if TYPE_CHECKING:
    from ofa.report.content import Content
    from ofa.report.table import Table as Told


@command
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `ofa compare --out` wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.md and report.html, instead of the comparison's own.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the results of a comparison, finished or not, as report.md and report.html, a self-contained page.

    Example: ofa report results
    """
    from ofa.comparison.store import read_records
    from ofa.errors import InputError
    from ofa.files import claimed_folder
    from ofa.report import build, read_runs, summary, write_report

    records = read_records(folder)
    if not records:
        raise InputError(f"{folder} has no finished cell yet: run `ofa compare --out {folder}`")
    content = build(records, read_runs(folder))
    # Shared: a comparison may still be running in this folder.
    with claimed_folder(out or folder, overwrite=True, shared=True) as target:
        written = write_report(content, target)
    if as_json:
        show_json({**summary(content), "files": [str(path) for path in written]})
    else:
        _show(content)
        notice(f"report: {' and '.join(map(str, written))}")


def _show(content: Content) -> None:
    """Show the main results; the files have all."""
    from ofa.report import tables, verdicts

    show(f"{verdicts.title(content)}: {verdicts.progress(content)}")
    for comparison in content.comparisons:
        show(verdicts.subject(comparison))
        for context in CONTEXTS:
            if comparison.in_context(context):
                _show_table(tables.glance(comparison, context))
        for sentence in (*verdicts.best(comparison), *verdicts.terms(comparison)):
            show(sentence)


def _show_table(table: Told) -> None:
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(table.caption))
    for column in table.columns:
        shown.add_column(Text(column.title), justify="right" if column.numeric else "left")
    for row in table.rows:
        shown.add_row(*(Text(entry.text, style="bold" if entry.tone == "best" else "") for entry in row))
    show(shown)
