"""Draws the table of `benchmarks.kernels`: share of the copy bandwidth against width, one panel per operation.

python -m benchmarks.plot_kernels benchmarks/results/kernels_h200.csv docs/figures/kernels.png
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.implementations import VARIANTS

COLUMNS = 4

Panel = tuple[str, str, str]
Curves = dict[str, list[tuple[int, float]]]


def draw(table: Path, figure_file: Path) -> bool:
    """Draw a table; returns False, without a file, if it has no Triton kernels."""
    with table.open(newline="") as stream:
        panels = curves(csv.DictReader(stream))
    if not any("triton" in panel for panel in panels.values()):
        return False
    figure = _figure(panels)
    figure_file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(figure_file, format="png", dpi=150)
    return True


def curves(rows: Iterable[dict[str, str]]) -> dict[Panel, Curves]:
    """(operation, N, dtype) → variant → (width, share of the copy bandwidth) for the most rows timed."""
    found = [row for row in rows if row["metric"] == "copy_share"]
    most: dict[tuple[Panel, int], int] = defaultdict(int)
    for row in found:
        most[_panel(row), int(row["width"])] = max(most[_panel(row), int(row["width"])], int(row["rows"]))
    panels: dict[Panel, Curves] = defaultdict(lambda: defaultdict(list))
    for row in found:
        width = int(row["width"])
        if int(row["rows"]) == most[_panel(row), width]:
            panels[_panel(row)][row["variant"]].append((width, float(row["value"])))
    return panels


def _panel(row: dict[str, str]) -> Panel:
    return row["benchmark"], row["samples"], row["dtype"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw an existing table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="CSV file of benchmarks.kernels")
    parser.add_argument("figure", type=Path, help="PNG file to write")
    options = parser.parse_args(arguments)
    if not draw(options.table, options.figure):
        parser.exit(1, f"{options.table} has no Triton kernels\n")


def _figure(panels: dict[Panel, Curves]) -> Any:
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.7 * lines + 0.5), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (panel, found) in zip(grid.flat, panels.items(), strict=False):
        _draw_panel(axes, panel, found)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    figure.supxlabel("width [columns]", fontsize=10)
    figure.supylabel("share of copy bandwidth", fontsize=10)
    entries = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in VARIANTS if name in entries]
    figure.legend([entries[name] for name in names], names, loc="outside upper center", ncols=len(names), frameon=False)
    return figure


def _draw_panel(axes: Any, panel: Panel, found: Curves) -> None:
    name, samples, dtype = panel
    for index, variant in enumerate(VARIANTS):
        if variant in found:
            widths, shares = zip(*sorted(found[variant]), strict=True)
            thickness = 2.0 if variant == "triton" else 1.2
            axes.plot(widths, shares, color=f"C{index}", label=variant, linewidth=thickness, marker="o", markersize=3)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_title(f"{name}, {f'N = {samples}, ' if samples != '0' else ''}{dtype}", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0.0)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
