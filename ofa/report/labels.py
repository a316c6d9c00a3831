"""Label the points of a scatter plot without covering other labels or points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]

_SIZE = 7.5  # points
_WIDTH = 0.56  # of a character, in font sizes; a generous mean for browser fonts
_GAP = 5.0
_STEPS = 20  # a label farther away would be hard to assign to its point


class _Box(NamedTuple):
    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: _Box) -> bool:
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.top <= other.bottom or other.top <= self.bottom)

    def within(self, other: _Box) -> bool:
        sideways = other.left <= self.left and self.right <= other.right
        return sideways and other.bottom <= self.bottom and self.top <= other.top


def label_points(axes: Axes, names: Mapping[Point, str], points: Iterable[Point]) -> None:
    """Write each name near its point, on the right if there is room; a moved name gets a line to its point.

    `points` must all stay visible, in data coordinates; the limits of the axes must be final. A name that does not fit
    inside the axes is left out.
    """
    from ofa.report.svg import COLORS

    unit = axes.figure.dpi / 72
    to_pixels = axes.transData.transform
    taken = [_Box(x - 3 * unit, y - 3 * unit, x + 3 * unit, y + 3 * unit) for x, y in map(to_pixels, points)]
    height = 1.15 * _SIZE * unit
    for point, name in sorted(names.items(), key=lambda item: -item[0][1]):
        x, y = to_pixels(point)
        width = (_WIDTH * len(name) + 0.5) * _SIZE * unit
        box = _place(_Box(x, y, x + width, y + height), taken, _Box(*axes.bbox.extents), unit)
        if box is None:
            continue
        taken.append(box)
        middle = (box.bottom + box.top) / 2
        moved = abs(middle - y) > 0.7 * height
        axes.annotate(
            name,
            point,
            xytext=((box.left - x) / unit, (middle - y) / unit),
            textcoords="offset points",
            va="center",
            fontsize=_SIZE,
            bbox={"facecolor": COLORS["paper"], "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": COLORS["muted"], "linewidth": 0.5} if moved else None,
        )


def _place(name: _Box, taken: Sequence[_Box], inside: _Box, unit: float) -> _Box | None:
    """The nearest free box for a name; the lower left corner of `name` is its point."""
    x, y, width, height = name.left, name.bottom, name.right - name.left, name.top - name.bottom
    for step in range(_STEPS):
        for direction in (1, -1):
            shift = direction * ((step + 1) // 2) * 0.6 * height
            away = _GAP * unit + abs(shift) * 0.4
            for left in (x + away, x - away - width):
                box = _Box(left, y + shift - height / 2, left + width, y + shift + height / 2)
                if box.within(inside) and not any(box.overlaps(other) for other in taken):
                    return box
    return None
