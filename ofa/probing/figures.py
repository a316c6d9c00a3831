"""Plot the layerwise curves of several models: probe accuracy and loss, step ratio, sharpness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from ofa.probing.results import Probe, Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_REFERENCE: dict[str, object] = {"color": "#555555", "linestyle": "--"}
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""The color-blind safe palette of Okabe and Ito, without the yellow, which is faint on white."""

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class _Panel:
    metric: str
    title: str
    scale: str = "linear"
    branch: str = "layer"


_PANELS = (
    _Panel("lens_accuracy", "Accuracy of the logit lens"),
    _Panel("lens_loss", "Loss of the logit lens [nats]", "log"),
    _Panel("linear_accuracy", "Accuracy of a linear probe"),
    _Panel("linear_loss", "Loss of a linear probe [nats]", "log"),
    _Panel("step_ratio", "Step ratio: length over that of the layer before", "log"),
    _Panel("trace", "Sharpness $h$ per token of the layer"),
    _Panel("trace", "Sharpness $h$ per token of the attention", branch="attention"),
    _Panel("trace", "Sharpness $h$ per token of the MLP", branch="mlp"),
    _Panel("trace", "Sharpness $h$ per token of attention and MLP", branch="attention+mlp"),
)

_Curves = Mapping[tuple[str, str], Sequence[Value]]
"""The points of every curve by metric and branch."""


def probe_figure(probes: Mapping[str, Probe], title: str) -> Figure:
    """A panel per metric with a line per model over the decoder layers; bands are ± 1 standard error.

    The first model is the reference, drawn dashed and gray. Step ratio and sharpness are those of whole layers; where
    layers have sublayer steps, the sharpness of attentions and MLPs has panels of its own.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    curves = {name: _curves(probe) for name, probe in probes.items()}
    panels = [panel for panel in _PANELS if any((panel.metric, panel.branch) in own for own in curves.values())]
    labels = next(iter(probes.values())).lens.log_probabilities.shape[2]
    rows = math.ceil(len(panels) / 2)
    with style.context("default"):  # ignore the user's own style, which may be dark
        figure = Figure(figsize=(10, 0.9 + 3 * rows), layout="constrained")
        grid = figure.subplots(rows, 2, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        for panel, axes in zip(panels, grid.flat, strict=False):
            place = panel.metric, panel.branch
            _draw(axes, panel, {name: own[place] for name, own in curves.items() if place in own}, labels)
        for axes in figure.axes[-2:]:
            axes.set_xlabel("decoder layer", fontsize=11)
        figure.legend(
            *grid[0, 0].get_legend_handles_labels(),
            loc="outside upper center",
            ncols=min(len(probes), 4),
            frameon=False,
            fontsize=12,
            title=f"{title} (bands: ± 1 standard error)",
            title_fontsize=11,
        )
    return figure


def _curves(probe: Probe) -> _Curves:
    curves: dict[tuple[str, str], list[Value]] = {}
    for value in probe.values():
        curves.setdefault((value.metric, value.branch), []).append(value)
    return curves


def _draw(axes: Axes, panel: _Panel, curves: Mapping[str, Sequence[Value]], labels: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.5, max(value.layer for curve in curves.values() for value in curve) + 0.5)
    for index, (name, curve) in enumerate(curves.items()):
        layers, means = [value.layer for value in curve], [value.value for value in curve]
        errors = [value.standard_error or 0.0 for value in curve]
        look = _REFERENCE if index == 0 else {"color": _COLORS[(index - 1) % len(_COLORS)], "linestyle": "-"}
        marker = _MARKERS[index % len(_MARKERS)]
        axes.plot(layers, means, label=name, marker=marker, markersize=3.5, linewidth=1.6, **look)
        low, high = zip(*((m - e, m + e) for m, e in zip(means, errors, strict=True)), strict=True)
        axes.fill_between(layers, low, high, color=look["color"], alpha=0.1, linewidth=0)
    axes.set_title(panel.title, loc="left", fontsize=12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _scale(axes, panel, [value.value for curve in curves.values() for value in curve])
    _guide(axes, panel, labels)
    if panel.metric == "trace":
        _leave_out_extremes(axes, curves)


def _scale(axes: Axes, panel: _Panel, values: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if panel.metric.endswith("accuracy"):
        axes.set_ylim(0, 1.02)
    if panel.scale == "log" and min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 50 * min(values) else (1,)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _guide(axes: Axes, panel: _Panel, labels: int) -> None:
    """A dotted baseline: guessing, steps of equal length, or a trace of zero."""
    guides = {"accuracy": (1 / labels, "guessing"), "loss": (math.log(labels), "guessing"), "ratio": (1.0, "equal")}
    place, meaning = guides.get(panel.metric.rpartition("_")[2], (0.0, ""))
    axes.axhline(place, color="black", linestyle=":", linewidth=1, zorder=0)
    # Outside the panel, so that no curve crosses the text.
    axes.annotate(meaning, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9)


def _leave_out_extremes(axes: Axes, curves: Mapping[str, Sequence[Value]]) -> None:
    """Replace layers whose values would flatten all others, often the first, by a note."""
    values = [value for curve in curves.values() for value in curve]
    limit = 10 * median(abs(value.value) for value in values)
    extreme = sorted({value.layer for value in values if abs(value.value) > limit})
    seen = [value.value for value in values if value.layer not in extreme]
    if not extreme or not seen:
        return
    low, high = min(0.0, *seen), max(0.0, *seen)
    margin = 0.08 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    reference = {value.layer: value.value for value in next(iter(curves.values()))}
    told = ", ".join(f"layer {layer} ({reference[layer]:.3g})" for layer in extreme)
    axes.annotate(f"off scale: {told}", (0.99, 0.97), xycoords="axes fraction", ha="right", va="top", fontsize=10)
