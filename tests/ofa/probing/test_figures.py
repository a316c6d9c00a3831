"""The figure of a probe: a panel per metric, a line per model, and no layer that flattens all others."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ofa.probing.figures import probe_figure
from ofa.probing.results import Probe, Readout, Steps

LAYERS, TEXTS, LABELS = 4, 5, 3


def made(*, seed=0, linear=True, parallel=False, sublayers=True, texts=TEXTS):
    """A probe with numbers of the usual sizes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(*shape, generator=generator)

    def readout():
        return Readout(random(LAYERS, texts, LABELS).log_softmax(2), torch.arange(texts) % LABELS)

    def steps(branches):
        count = LAYERS * len(branches)
        layers = tuple(index // len(branches) for index in range(count))
        numbers = 1 + random(count, texts), 1 + random(count - 1, texts), 1 + random(count, texts)
        return Steps(layers, branches * LAYERS, "exact", *numbers)

    parts = {"sublayer": steps(("attention+mlp",) if parallel else ("attention", "mlp"))} if sublayers else {}
    return Probe(readout(), readout() if linear else None, {**parts, "layer": steps(("layer",))}, "first token", 0, 1.0)


LENS = ["Accuracy of the logit lens", "Loss of the logit lens [nats]"]
LINEAR = ["Accuracy of a linear probe", "Loss of a linear probe [nats]"]
WHOLE = ["Step ratio: length over that of the layer before", "Sharpness $h$ per token of the layer"]
PARTS = ["Sharpness $h$ per token of the attention", "Sharpness $h$ per token of the MLP"]


@pytest.mark.parametrize(
    ("options", "panels"),
    [
        ({}, LENS + LINEAR + WHOLE + PARTS),
        ({"linear": False}, LENS + WHOLE + PARTS),
        ({"parallel": True, "linear": False}, [*LENS, *WHOLE, "Sharpness $h$ per token of attention and MLP"]),
        ({"sublayers": False}, LENS + LINEAR + WHOLE),
    ],
    ids=["everything", "no linear probe", "parallel branches", "layers only"],
)
def test_every_metric_has_a_panel(options, panels):
    """One line per model in each panel, over its layers; one legend."""
    figure = probe_figure({"base model": made(**options), "adapter": made(seed=1, **options)}, "task")
    assert [axes.get_title(loc="left") for axes in figure.axes] == panels
    for axes in figure.axes:
        first = 2 if "Step ratio" in axes.get_title(loc="left") else 1
        lines = [line for line in axes.lines if not line.get_label().startswith("_")]
        assert [line.get_label() for line in lines] == ["base model", "adapter"]
        assert all(list(line.get_xdata()) == list(range(first, LAYERS + 1)) for line in lines)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["base model", "adapter"]
    assert legend.get_title().get_text().startswith("task")


def test_lines_have_the_measured_values():
    probe = made()
    figure = probe_figure({"base model": probe}, "task")
    drawn = {axes.get_title(loc="left"): list(axes.lines[0].get_ydata()) for axes in figure.axes}
    assert drawn[LENS[0]] == pytest.approx(probe.lens.accuracy.tolist())
    assert drawn[LINEAR[1]] == pytest.approx(probe.linear.loss.tolist())
    assert drawn[WHOLE[0]] == pytest.approx(probe.steps["layer"].ratios.mean(1).tolist())
    assert drawn[PARTS[1]] == pytest.approx(probe.steps["sublayer"].traces[1::2].mean(1).tolist())


def test_the_guessing_baseline_is_drawn():
    """Accuracy at 1/labels, loss at ln(labels)."""
    accuracy, loss = probe_figure({"base model": made()}, "task").axes[:2]
    assert accuracy.lines[-1].get_ydata()[0] == pytest.approx(1 / LABELS)
    assert loss.lines[-1].get_ydata()[0] == pytest.approx(math.log(LABELS))


def test_an_extreme_layer_is_replaced_by_a_note():
    """The others are between 1 and 2, a flat line on a scale that includes −100."""
    probe = made()
    probe.steps["sublayer"].traces[1] = -100.0
    figure = probe_figure({"base model": probe}, "task")
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    low, high = panels[PARTS[1]].get_ylim()
    assert -1 < low < 0 < 1 < high < 3
    assert "off scale: layer 1 (-100)" in [text.get_text() for text in panels[PARTS[1]].texts]
    assert not any("off scale" in text.get_text() for text in panels[PARTS[0]].texts)


def test_lines_are_told_apart_by_color_and_by_marker():
    """For readers who do not see the colors, and for more adapters than there are colors."""
    figure = probe_figure({f"model {index}": made(seed=index, linear=False) for index in range(9)}, "task")
    looks = [(line.get_color(), line.get_marker()) for line in figure.axes[0].lines[:9]]
    assert len(set(looks)) == 9
    assert len({color for color, _ in looks[:7]}) == len({marker for _, marker in looks[:7]}) == 7


@pytest.mark.parametrize("edge", ["one text", "no loss at all"])
def test_a_single_text_and_a_zero_loss_can_be_drawn(tmp_path, edge):
    """A single text has no band; a loss of exactly zero has no logarithm."""
    probe = made(texts=1 if edge == "one text" else TEXTS)
    if edge == "no loss at all":
        certain = torch.full((LAYERS, TEXTS, LABELS), -torch.inf)
        certain[:, range(TEXTS), probe.lens.truth] = 0.0
        probe = replace(probe, lens=Readout(certain, probe.lens.truth))
    path = tmp_path / "probe.png"
    probe_figure({"base model": probe}, "task").savefig(path)
    assert path.read_bytes().startswith(b"\x89PNG")
