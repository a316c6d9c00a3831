"""Draw the figures of a report: accuracy against time to fit, differences, ranks, tasks, seeds.

Filled markers are tests without demonstrations in context, hollow ones with them. OFA, its two terms alone and norm
tuning have colors, every other method is gray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ofa.comparison.outcomes import Row
from ofa.comparison.records import CONTEXTS
from ofa.report.content import NORM_TUNING, OFA, Comparison, Line
from ofa.report.labels import label_points
from ofa.report.statistics import Interval
from ofa.report.svg import COLORS, themed_svg
from ofa.report.table import WITH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 9.6  # inches; the page shows 1.4 times as many
_LINE = 0.19  # height of a line of text
_NAMES = 1.75  # width for methods' names
_MARKER = 5.0

_Point = tuple[Row, float, float]  # a row, its seconds to fit, its macro accuracy in percent


@dataclass(frozen=True)
class Drawn:
    """A figure on the page: its title, the sentence below it, and the `<svg>` element."""

    name: str
    title: str
    caption: str
    svg: str


def role(row: Row) -> str:
    """The role that sets a row's color: ofa, term (another objective of OFA), norm or other."""
    roles = {NORM_TUNING: "norm", OFA: "ofa"}
    return roles.get(row.method, "term" if row.method.startswith(f"{OFA}-") else "other")


def figures(comparison: Comparison, prefix: str) -> list[Drawn]:
    """All figures for which there are results; `prefix` makes ids unique for several models on one page."""
    averaged = [line for line in comparison.lines if line.macro]
    contrasted = [line for line in comparison.lines if NORM_TUNING in line.contrasts]
    planned: list[tuple[bool, str, str, str, Callable[[], Figure]]] = [
        (
            bool(averaged),
            "fit",
            "Accuracy against time to fit",
            "The line joins the rows that no cheaper row matches. Filled: without demonstrations in context, hollow: "
            "with them.",
            partial(_fit, averaged),
        ),
        (
            bool(contrasted),
            "differences",
            f"Difference to {NORM_TUNING}",
            "Mean over task and seed with the 95 % interval; faint where the interval includes zero.",
            partial(_differences, contrasted),
        ),
        (
            comparison.ranks is not None and len(comparison.ranks.rows) > 1,
            "ranks",
            "Mean rank",
            "Over tasks and seeds, 1 is best, with the 95 % interval.",
            partial(_ranks, comparison),
        ),
        (
            any(line.tasks for line in comparison.lines),
            "tasks",
            "Accuracy by task",
            "Mean and standard deviation over seeds.",
            partial(_tasks, comparison),
        ),
        (
            len(comparison.seeds) > 1,
            "seeds",
            "Accuracy by seed",
            "A seed's shots are the same for all methods, so that lines that run side by side differ by the method.",
            partial(_seeds, comparison),
        ),
    ]
    return [
        Drawn(name, title, caption, themed_svg(draw, f"{prefix}-{name}", f"{title}. {caption}"))
        for there, name, title, caption, draw in planned
        if there
    ]


def _fit(lines: Sequence[Line]) -> Figure:
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure, (axes,) = _panels(1, 1, height=3.2, left=0.5, width=5.4)
    points = [(line.row, line.cost.fit_seconds.mean, _macro(line)) for line in lines if line.cost]
    front = _front(points)
    # Methods that learn nothing take zero time, which a log scale cannot show.
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.5)
    along, up = [seconds for _, seconds, _ in front], [accuracy for _, _, accuracy in front]
    axes.step(along, up, where="post", color=COLORS["muted"], linewidth=0.8)
    for row, seconds, accuracy in points:
        axes.plot(seconds, accuracy, **_marker(row))
    axes.set(xlabel="seconds to fit one task", ylabel="macro accuracy, %")
    axes.margins(y=0.12)
    axes.set_xlim(-0.35, max(6 * max(seconds for _, seconds, _ in points), 10))  # with room for the points' names
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    named = [point for point in points if point in front or (role(point[0]) != "other" and not point[0].settings)]
    names = {(seconds, accuracy): row.name for row, seconds, accuracy in named}
    label_points(axes, names, [(seconds, accuracy) for _, seconds, accuracy in points])
    return figure


def _front(points: Sequence[_Point]) -> list[_Point]:
    """The Pareto front by rising cost: points whose accuracy no point of the same or lower cost reaches."""
    front: list[_Point] = []
    for point in sorted(points, key=lambda point: (point[1], -point[2])):
        if not front or point[2] > front[-1][2]:
            front.append(point)
    return front


def _differences(lines: Sequence[Line]) -> Figure:
    names = list(dict.fromkeys(line.row.name for line in lines))
    contexts = [context for context in CONTEXTS if any(line.row.context == context for line in lines)]
    figure, panels = _panels(1, len(contexts), height=_LINE * len(names) + 0.8, left=_NAMES, sharey=True)
    for axes, context in zip(panels, contexts, strict=True):
        axes.axvline(0, color=COLORS["muted"], linewidth=1)
        for line in lines:
            if line.row.context == context:
                difference = line.contrasts[NORM_TUNING].difference
                height = _height(line.row, names)
                faint = 1.0 if difference.sign else 0.4
                _dot(axes, line.row, difference.mean, height, difference.interval, scale=100, alpha=faint)
        axes.set(title=WITH[context], xlabel="points of accuracy")
    _name_lines(panels[0], names)
    return figure


def _ranks(comparison: Comparison) -> Figure:
    ranks = comparison.ranks.rows if comparison.ranks else {}
    rows = sorted(ranks, key=lambda row: ranks[row].mean)
    figure, (axes,) = _panels(1, 1, height=_LINE * len(rows) + 0.65, left=_NAMES + 1.0, width=0.78 * _WIDTH)
    for place, row in enumerate(rows):
        _dot(axes, row, ranks[row].mean, place, ranks[row].interval)
    axes.set(xlabel="mean rank")
    axes.set_xlim(left=0.5)
    _name_lines(axes, [row.label for row in rows])
    return figure


def _tasks(comparison: Comparison) -> Figure:
    lines = [line for line in comparison.lines if line.tasks]
    names = list(dict.fromkeys(line.row.name for line in lines))
    columns = min(4, len(comparison.problems))
    rows = -(-len(comparison.problems) // columns)
    height = rows * (_LINE * len(names) + 0.75)
    width = _NAMES + (_WIDTH - _NAMES) * max(columns, 2) / 4
    figure, panels = _panels(rows, columns, height=height, left=_NAMES, width=width, sharey=True)
    for axes, problem in zip(panels, comparison.problems, strict=False):
        for line in lines:
            if problem in line.tasks:
                spread = line.tasks[problem]
                around = Interval(*(spread.mean + side * (spread.deviation or 0.0) for side in (-1, 1)))
                _dot(axes, line.row, spread.mean, _height(line.row, names), around, scale=100)
        axes.set(title=comparison.names[problem], xlabel="accuracy, %")
    for axes in panels[len(comparison.problems) :]:
        axes.set_visible(False)
    for first in panels[::columns]:
        _name_lines(first, names)
    return figure


def _seeds(comparison: Comparison) -> Figure:
    contexts = [context for context in CONTEXTS if any(line.row.context == context for line in comparison.lines)]
    columns = len(comparison.problems)
    width = _WIDTH * min(1.0, max(columns, 2) / 4)
    figure, panels = _panels(len(contexts), columns, height=2.3 * len(contexts), left=0.55, width=width, sharey="col")
    for place, axes in enumerate(panels):
        context, problem = contexts[place // columns], comparison.problems[place % columns]
        for line in sorted(comparison.lines, key=lambda line: role(line.row) != "other"):
            if line.row.context == context:
                seeds = [draw.seed for draw in sorted(line.accuracy) if draw.problem == problem]
                values = [100 * line.accuracy[draw] for draw in sorted(line.accuracy) if draw.problem == problem]
                plain = role(line.row) == "other"
                style = {**_marker(line.row), "linestyle": "-", "linewidth": 0.7 if plain else 1.4, "markersize": 3}
                axes.plot([str(seed) for seed in seeds], values, **style, alpha=0.45 if plain else 1.0)
        if place < columns:
            axes.set_title(comparison.names[problem])
        if place % columns == 0:
            axes.set_ylabel(f"{WITH[context]}, %")
    return figure


def _panels(
    rows: int, columns: int, *, height: float, left: float, width: float = _WIDTH, sharey: Literal["col"] | bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of the given size in inches with its panels in reading order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    grid = figure.subplots(rows, columns, sharey=sharey, squeeze=False)
    figure.subplots_adjust(
        left=left / width,
        right=1 - 0.2 / width,
        bottom=0.5 / height,
        top=1 - 0.3 / height,
        wspace=0.1 if sharey is True else 0.22,
        hspace=0.75 * rows / height if rows > 1 else 0,
    )
    return figure, list(grid.flat)


def _marker(row: Row) -> dict[str, Any]:
    color = COLORS[role(row)]
    hollow = row.context == "demonstrations"
    return {
        "marker": "o",
        "markersize": _MARKER,
        "color": color,
        "markerfacecolor": COLORS["paper"] if hollow else color,
        "markeredgecolor": color,
        "linestyle": "none",
        "zorder": 2 if role(row) == "other" else 3,
    }


def _dot(
    axes: Axes,
    row: Row,
    value: float,
    height: float,
    interval: Interval | None,
    *,
    scale: float = 1,
    alpha: float = 1.0,
) -> None:
    """A marker with its interval, both multiplied by `scale`."""
    if interval is not None:
        ends = [scale * interval.low, scale * interval.high]
        axes.plot(ends, [height, height], color=COLORS[role(row)], linewidth=1.1, alpha=alpha)
    axes.plot(scale * value, height, **_marker(row), alpha=alpha)


def _height(row: Row, names: Sequence[str]) -> float:
    """The height of a row: at its name, with the two contexts slightly apart."""
    return names.index(row.name) + (0.16 if row.context == "demonstrations" else -0.16)


def _name_lines(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _macro(line: Line) -> float:
    return 100 * line.macro.mean if line.macro else 0.0
