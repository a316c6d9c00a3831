"""Figures exist for all measurements, with literal names that do not overlap."""

from __future__ import annotations

import re

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from ofa.report.content import build
from ofa.report.figures import figures, role
from ofa.report.labels import label_points
from ofa.report.svg import COLORS, themed_svg
from tests.ofa.report.synthetic import record, with_accuracy


def rows(*names, seeds=(1,), task="sst2"):
    return [
        record(name, {"prompt": with_accuracy(5 + place)}, seed=seed, task=task, fit_seconds=place)
        for place, name in enumerate(names)
        for seed in seeds
    ]


def drawn(records):
    return figures(build(records).comparisons[0], "model-1")


@pytest.mark.parametrize(
    ("records", "names"),
    [
        (rows("ofa"), ["fit", "tasks"]),
        (rows("ofa", "lora"), ["fit", "ranks", "tasks"]),
        (rows("norm-tuning", "ofa"), ["fit", "differences", "ranks", "tasks"]),
        (rows("ofa", seeds=(1, 2)), ["fit", "tasks", "seeds"]),
        ([*rows("ofa", task="a"), *rows("lora", task="b")], ["tasks"]),
        ([record("ofa", None, error="diverged")], []),
    ],
    ids=["one cell", "two rows", "with a baseline", "two seeds", "no average", "nothing"],
)
def test_there_are_figures_for_exactly_what_was_measured(records, names):
    assert [one.name for one in drawn(records)] == names


def test_nine_tasks_have_a_panel_each():
    records = [one for task in "abcdefghi" for one in rows("ofa", task=task)]
    (tasks,) = (one for one in drawn(records) if one.name == "tasks")
    assert re.findall(r">([a-i])</text>", tasks.svg) == list("abcdefghi")


def test_names_are_written_as_they_are():
    """A dollar sign is no formula, and markup no element."""
    (tasks,) = (one for one in drawn(rows("ofa", task="$x^2$ <b>&")) if one.name == "tasks")
    assert "$x^2$ &lt;b&gt;&amp;</text>" in tasks.svg


@pytest.mark.parametrize(
    ("method", "color"),
    [("norm-tuning", "norm"), ("ofa", "ofa"), ("ofa-step-ratio", "term"), ("ofa-paper", "term"), ("lora", "other")],
)
def test_rows_are_colored_by_method(method, color):
    (line,) = build(rows(method)).comparisons[0].lines
    assert role(line.row) == color
    assert f"var(--{color})" in drawn(rows(method))[0].svg


def test_figures_are_reproducible():
    """Reports of the same results are the same file: no dates, no random ids."""
    assert drawn(rows("ofa", "lora")) == drawn(rows("ofa", "lora"))


def test_a_figure_is_an_image_with_a_description():
    def draw():
        figure = Figure(figsize=(2, 1))
        figure.text(0.5, 0.5, "x", color=COLORS["ink"])
        return figure

    svg = themed_svg(draw, "name", 'what "it" shows')
    assert svg.startswith("<svg ")
    assert 'role="img" aria-label="what &quot;it&quot; shows"' in svg
    assert "<metadata>" not in svg
    assert "width=" not in svg.split(">")[0]


def test_a_name_without_a_place_is_left_out():
    """Rather than over the edge of the axes, or over other names."""
    figure = Figure(figsize=(5, 1))
    axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    label_points(axes, {(0.5, 0.01 * index): "a name of some length" for index in range(50)}, [])
    figure.draw_without_rendering()
    assert 1 <= len(axes.texts) < 50
    for text in axes.texts:
        box = Text.get_window_extent(text)
        assert axes.bbox.y0 <= box.y0 + 1  # the height of a line is rounded to pixels
        assert box.y1 <= axes.bbox.y1 + 1


def test_names_cover_neither_each_other_nor_a_point():
    """Twelve points so close together that most names have to move, in the pixels of what is drawn."""
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    points = [(10 + index % 3, 50 + 0.4 * index) for index in range(12)]
    axes.set(xlim=(0, 30), ylim=(40, 70))
    label_points(axes, {point: f"method-{index}" for index, point in enumerate(points)}, points)
    figure.draw_without_rendering()
    # The extent of an annotation has its line in it; that of its text does not.
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert len(boxes) == 12
    for index, box in enumerate(boxes):
        assert not any(box.shrunk(0.9, 0.9).overlaps(other.shrunk(0.9, 0.9)) for other in boxes[:index])
        assert not any(box.contains(*axes.transData.transform(point)) for point in points)
        assert axes.bbox.x0 <= box.x0
        assert box.x1 <= axes.bbox.x1
