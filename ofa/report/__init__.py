"""Report the results of a comparison as Markdown, as one HTML page, and as JSON values."""

from __future__ import annotations

from pathlib import Path

from ofa.report.content import Content, build
from ofa.report.runs import read_runs
from ofa.report.summary import summary

__all__ = ["MARKDOWN", "PAGE", "Content", "build", "read_runs", "summary", "write_report"]

MARKDOWN, PAGE = "report.md", "report.html"


def write_report(content: Content, folder: Path) -> tuple[Path, Path]:
    """Write the Markdown document and the HTML page into a folder, both or neither.

    Returns:
        Their paths.

    Raises:
        InputError: the folder cannot be written.
    """
    from ofa.files import text_writer, write_together
    from ofa.report.markdown import markdown
    from ofa.report.page import page

    texts = {folder / MARKDOWN: markdown(content), folder / PAGE: page(content)}
    write_together({path: text_writer(text) for path, text in texts.items()})
    return folder / MARKDOWN, folder / PAGE
