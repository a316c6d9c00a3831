"""Figures are PNG files with a panel for each measured term."""

from __future__ import annotations

import struct

import pytest
from matplotlib.figure import Figure

from ofa.errors import InputError
from ofa.training.figure import training_figure
from ofa.training.records import StepRecord


def records(*, step_ratio=None, sharpness=None, count=3):
    return [
        StepRecord(
            step=step,
            epoch=1,
            loss=2.0 / step,
            step_ratio=step_ratio and step_ratio / step,
            sharpness=sharpness and sharpness / step,
            penalty=0.0,
            learning_rate=1e-3,
            gradient_norm=1.0,
            drift=0.0,
            seconds=0.1 * step,
        )
        for step in range(1, count + 1)
    ]


@pytest.fixture
def drawn(monkeypatch):
    """Saved figures."""
    figures, save = [], Figure.savefig

    def spy(figure, *given, **options):
        figures.append(figure)
        save(figure, *given, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


LOSS, RATIO, SHARPNESS = "cross-entropy [nats]", "step ratio J", "sharpness H"


@pytest.mark.parametrize(
    ("runs", "panels"),
    [
        ({"norm tuning": records()}, {LOSS: 1}),
        ({"OFA": records(step_ratio=9.0, sharpness=4.0)}, {LOSS: 1, RATIO: 1, SHARPNESS: 1}),
        ({"half": records(sharpness=4.0)}, {LOSS: 1, SHARPNESS: 1}),
        ({"norm tuning": records(), "OFA": records(step_ratio=9.0)}, {LOSS: 2, RATIO: 1}),
    ],
    ids=["loss only", "all", "one half", "two runs"],
)
def test_a_panel_is_drawn_for_every_term_that_a_run_measured(tmp_path, drawn, runs, panels):
    """One line per run that measured it, over the optimizer steps, named in the legend."""
    path = tmp_path / "training.png"
    training_figure(runs, path)
    (figure,) = drawn
    assert {axes.get_ylabel(): len(axes.lines) for axes in figure.axes} == panels
    for axes in figure.axes:
        assert axes.get_xlabel() == "optimizer step"
        assert len(axes.get_legend().get_texts()) == len(axes.lines)
    loss = figure.axes[0].lines[0]
    assert list(loss.get_xdata()) == [1, 2, 3]
    assert list(loss.get_ydata()) == [2.0, 1.0, 2.0 / 3]


def test_the_file_is_a_png_without_temporary_files(tmp_path):
    """Signature, a header of plausible size, the end chunk, and no temporary file beside it."""
    path = tmp_path / "training.png"
    training_figure({"run": records()}, path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 300
    assert height > 300
    assert content[-8:-4] == b"IEND"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_of_one_step_can_be_drawn(tmp_path):
    training_figure({"run": records(count=1)}, tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 1000


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(InputError, match=r"training\.png cannot be written"):
        training_figure({"run": records()}, tmp_path / "missing" / "training.png")
