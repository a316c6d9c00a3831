"""Memory traffic of eager PyTorch for the same operations: every kernel reads its inputs and writes its outputs once.

`python -m benchmarks.eager_traffic` prints, per operation and direction, the model's bytes, eager's, how many kernels
eager launches, and the ratio: the gain of fusing if memory is the bottleneck. Nothing is computed: tensors have shapes
and no data, so any size can be counted on any machine. `--plot` draws it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.implementations import Case, Implementation, Pass, passes

VIEWS = (
    "view", "expand", "slice", "select", "aten.t.", "transpose", "squeeze", "detach", "alias", "unbind", "as_strided",
)  # fmt: skip
"""Operations that return the same memory."""


@dataclass(frozen=True)
class Counted:
    """Bytes that the kernels of a call move, and how many kernels there are."""

    nbytes: int
    kernels: int


def count(one: Pass, case: Case) -> Counted:
    """Count one pass of the reference."""
    with FakeTensorMode():
        inputs, gradients = one.draw(case)
        # The forward pass of a backward call runs here, and is not counted.
        call = Implementation(one.operation.eager).prepare(inputs, gradients)
        with Ledger() as ledger:
            call()
    return Counted(ledger.nbytes, ledger.kernels)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="rows of a tensor")
    parser.add_argument("--width", type=int, default=4096, help="columns of a row")
    parser.add_argument("--plot", type=Path, help="PNG file to draw")
    options = parser.parse_args(arguments)
    case = Case(options.rows, options.width, torch.bfloat16, torch.device("cpu"))
    found = {one.label: (one.traffic(case).total, count(one, case)) for one in passes((1, 4))}
    print("| operation | bytes by the model | bytes of eager | kernels of eager | ratio |\n|---|---|---|---|---|")
    for label, (least, counted) in found.items():
        sizes = f"{1e-9 * least:.2f} GB | {1e-9 * counted.nbytes:.2f} GB"
        print(f"| {label} | {sizes} | {counted.kernels} | {counted.nbytes / least:.1f} |")
    if options.plot:
        _draw(
            found,
            f"{case.rows} × {case.width}, bfloat16: bytes that must move, and that eager PyTorch moves",
            options.plot,
        )


def _draw(found: dict[str, tuple[int, Counted]], title: str, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.32 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots()
    labels = list(found)[::-1]
    least = [1e-9 * found[label][0] for label in labels]
    eager = [1e-9 * found[label][1].nbytes for label in labels]
    axes.barh(labels, eager, color="C1", label="eager")
    axes.barh(labels, least, color="C0", label="bytes model of the kernels")
    for label, low, high in zip(labels, least, eager, strict=True):
        axes.annotate(f" {high / low:.0f}×", (high, label), va="center", fontsize=8)
    axes.set_xlabel("GB")
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.08)
    axes.legend(frameon=False, loc="upper right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=120)


class Ledger(TorchDispatchMode):
    """Counts the kernels that run in this context, and the bytes that they move."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Queries about a tensor, such as its device, return no tensor.
        computes = any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
        if computes and not any(name in str(func) for name in (*VIEWS, "empty")):
            self.kernels += 1
            self.nbytes += sum(map(_nbytes, tree_leaves((args, kwargs, result))))
        return result


def _nbytes(leaf: Any) -> int:
    """Bytes of a tensor in memory; an expanded tensor has fewer than its shape."""
    if not isinstance(leaf, Tensor):
        return 0
    held = [size for size, stride in zip(leaf.shape, leaf.stride(), strict=True) if stride != 0]
    return torch.Size(held).numel() * leaf.element_size()


if __name__ == "__main__":
    main()
