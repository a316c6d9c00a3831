"""Label the points of a scatter plot without covering other labels or points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox, BboxBase

Point = tuple[float, float]

_SIZE = 7.5  # points
_WIDTH = 0.56  # of a character, in font sizes; a generous mean for browser fonts
_GAP = 5.0
_STEPS = 20  # a label farther away would be hard to assign to its point


def label_points(axes: Axes, names: Mapping[Point, str], points: Iterable[Point]) -> None:
    """Write each name near its point, on the right if there is room; a moved name gets a line to its point.

    `points` must all stay visible, in data coordinates; the limits of the axes must be final. A name that does not fit
    inside the axes is left out.
    """
    from matplotlib.transforms import Bbox

    from ofa.report.svg import COLORS

    unit = axes.figure.dpi / 72
    to_pixels = axes.transData.transform
    taken = [Bbox.from_bounds(x - 3 * unit, y - 3 * unit, 6 * unit, 6 * unit) for x, y in map(to_pixels, points)]
    height = 1.15 * _SIZE * unit
    for point, name in sorted(names.items(), key=lambda item: -item[0][1]):
        x, y = to_pixels(point)
        width = (_WIDTH * len(name) + 0.5) * _SIZE * unit
        box = _place(Bbox.from_bounds(x, y, width, height), taken, axes.bbox, unit)
        if box is None:
            continue
        taken.append(box)
        middle = (box.y0 + box.y1) / 2
        moved = abs(middle - y) > 0.7 * height
        axes.annotate(
            name,
            point,
            xytext=((box.x0 - x) / unit, (middle - y) / unit),
            textcoords="offset points",
            va="center",
            fontsize=_SIZE,
            bbox={"facecolor": COLORS["paper"], "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": COLORS["muted"], "linewidth": 0.5} if moved else None,
        )


def _place(name: Bbox, taken: Sequence[Bbox], inside: BboxBase, unit: float) -> Bbox | None:
    """The nearest free box for a name; the lower left corner of `name` is its point."""
    for step in range(_STEPS):
        for direction in (1, -1):
            shift = direction * ((step + 1) // 2) * 0.6 * name.height
            away = _GAP * unit + abs(shift) * 0.4
            for sideways in (away, -away - name.width):
                box = name.translated(sideways, shift - name.height / 2)
                within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
                if within and not box.count_overlaps(taken):
                    return box
    return None
