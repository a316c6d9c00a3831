"""Render figures as SVG whose colors are CSS properties of the page, for light and dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Unique placeholder colors, replaced by the custom properties of the page's stylesheet.
_ROLES = ("ink", "muted", "line", "paper", "ofa", "term", "norm", "other")
COLORS = {role: f"#0a0b{number:02x}" for number, role in enumerate(_ROLES, start=1)}

_MAGNIFIED = 1.76  # maximum pixels of the page per point of the figure: text of 8.5 points is 15 pixels high

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.facecolor": "none",
    "axes.edgecolor": COLORS["line"],
    "axes.labelcolor": COLORS["muted"],
    "axes.titlecolor": COLORS["ink"],
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLORS["line"],
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "text.color": COLORS["ink"],
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8.5,
    "xtick.color": COLORS["line"],
    "ytick.color": COLORS["line"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.labelcolor": COLORS["ink"],
    "legend.frameon": False,
}


def themed_svg(draw: Callable[[], Figure], name: str, description: str) -> str:
    """The figure of `draw` as one `<svg>` element for a page; `name` makes its ids unique on the page.

    The element scales with the page, has the role of an image with `description`, and has no external references.
    """
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        buffer = io.StringIO()
        draw().savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _embedded(buffer.getvalue(), name, description)


def _embedded(document: str, name: str, description: str) -> str:
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening = re.match(r'<svg[^>]*viewBox="(?P<box>[^"]*)"[^>]*>', svg, re.DOTALL)
    if opening is None:
        raise AssertionError("matplotlib's SVG has no view box")
    natural = _MAGNIFIED * float(opening["box"].split()[2])
    head = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="{opening["box"]}" style="--natural: {natural:.0f}px" role="img" aria-label="{escape(description)}">'
    )
    body = svg[opening.end() :]
    # Ids are unique only within a figure, but all figures share one page.
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", body)
    return head + re.sub(r'style="[^"]*"', _with_properties, body)


def _with_properties(style: re.Match[str]) -> str:
    return re.sub("|".join(COLORS.values()), lambda color: f"var(--{_PROPERTY[color[0]]})", style[0])


_PROPERTY = {color: role for role, color in COLORS.items()}
