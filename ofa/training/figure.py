"""The figure of training runs as a PNG file, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ofa.files import write_atomically

if TYPE_CHECKING:
    from ofa.training.records import StepRecord

_PANELS = (
    ("loss", "cross-entropy [nats]", "log"),
    ("step_ratio", "step ratio J", "linear"),
    ("sharpness", "sharpness H", "linear"),
)


def training_figure(runs: Mapping[str, Sequence[StepRecord]], path: Path) -> None:
    """Cross-entropy, step ratio and sharpness over the optimizer steps, one line per run that measured them.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    measured = [panel for panel in _PANELS if any(_values(records, panel[0]) for records in runs.values())]
    figure = Figure(figsize=(4.2 * len(measured), 3.4), layout="constrained")
    for axes, (name, label, scale) in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
        for index, (run, records) in enumerate(runs.items()):
            values = _values(records, name)
            if values:
                # Color by position, so that a run has the same color in every panel.
                axes.plot([record.step for record in records], values, color=f"C{index}", label=run, linewidth=1.4)
        axes.set(xlabel="optimizer step", ylabel=label, yscale=scale)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _values(records: Sequence[StepRecord], name: str) -> list[float]:
    values = [getattr(record, name) for record in records]
    return [value for value in values if value is not None]
