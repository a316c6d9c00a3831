"""Figures as SVG that takes its colors from the page, so that one figure is readable in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Placeholders that no other color is equal to; each becomes the custom property that the page's stylesheet defines.
_ROLES = ("ink", "muted", "line", "paper", "ofa", "term", "norm", "other")
COLORS = {role: f"#0a0b{number:02x}" for number, role in enumerate(_ROLES, start=1)}

_MAGNIFIED = 1.76  # pixels of the page for a point of the figure, at most: text of 8.5 points is 15 pixels high

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
    """The figure that `draw` makes, as one `<svg>` element for a page; `name` keeps its ids apart from other figures'.

    The element scales with the page, is announced as an image with `description`, and refers to nothing outside it.
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
    # Ids are unique in a figure only, and all figures stand on one page.
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", body)
    return head + re.sub(r'style="[^"]*"', _with_properties, body)


def _with_properties(style: re.Match[str]) -> str:
    return re.sub("|".join(COLORS.values()), lambda color: f"var(--{_PROPERTY[color[0]]})", style[0])


_PROPERTY = {color: role for role, color in COLORS.items()}
