"""Launches and memory traffic of one Llama layer in a training step, counted without a GPU.

python -m benchmarks.launches --out benchmarks/results/launches.csv

The operations are those of a GPU, in bfloat16 with float32 scales. PyTorch's are counted where they are dispatched, and
the project's kernels where they would be launched; these compute nothing. A layer's share is a step of three layers
less one of two. Traffic is that of all operations but matrix products and attention: each reads its inputs and writes
its outputs once, in units of the stream (tokens · width · 2 bytes).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_leaves

import ofa
from benchmarks.eager_traffic import Ledger, _nbytes
from benchmarks.host_time import kernels_everywhere
from benchmarks.table import commit, significant, writing
from benchmarks.workloads import TINY, Workload, batch, build, step
from ofa_kernels.ops import contract, norm_step, perturb, probed_diagonal
from ofa_kernels.ops.launching import launching_by

# The ratio of both widths is that of a 7B model; γ and sums of its gradient are small beside the rows.
SIZES = {"hidden_size": 64, "num_key_value_heads": 4, "intermediate_size": 172}
TOKENS = 2048
OWN_NORMS = "transformers' norms"
RATIO: dict[str, Any] = {"step_ratio": 0.1, "sharpness": 0.0, "tokens": "all"}
PROBE: dict[str, Any] = {**RATIO, "sharpness": 0.1, "estimator": "hutchinson"}
VARIANTS: dict[str, tuple[bool, bool, dict[str, Any]]] = {
    OWN_NORMS: (False, False, {}),
    "tuned norms": (True, False, {}),
    "tuned norms, step ratio": (True, False, RATIO),
    "fused layers": (True, True, {}),
    "fused layers, step ratio": (True, True, RATIO),
    "fused layers, one probe": (True, True, PROBE),
    "fused layers, four probes": (True, True, {**PROBE, "samples": 4}),
    "fused layers, one probe, full": (True, True, {**PROBE, "gradient": "full"}),
}
"""Whether the kernels are used, whether layers are fused, and the regularizers, if any.

Probes come with the step ratio, and run each branch on their copies; `full` is the paper's gradient.
"""

PRODUCTS = ("mm.", "scaled_dot_product")
MAYBE_VIEWS = ("aten.reshape", "aten.to.")
FILLING = ("slice_backward", "select_backward")
IMPLEMENTATIONS: dict[Any, Any] = {
    torch.ops.ofa_kernels.norm_step.default: norm_step.forward,
    torch.ops.ofa_kernels.norm_step_backward.default: norm_step.backward,
    torch.ops.ofa_kernels.perturb.default: perturb.forward,
    torch.ops.ofa_kernels.perturb_backward.default: perturb.backward,
    torch.ops.ofa_kernels.contract.default: contract.forward,
    torch.ops.ofa_kernels.contract_backward.default: contract.backward,
    torch.ops.ofa_kernels.probed_diagonal.default: probed_diagonal.forward,
}


@dataclass(frozen=True)
class Row:
    """One count of one layer."""

    variant: str
    metric: str
    value: float
    unit: str
    torch: str
    transformers: str
    commit: str


@dataclass(frozen=True)
class Counted:
    """Kernels that a step launches, and bytes that those move which are no products."""

    launches: int
    nbytes: int


class Launches(Ledger):
    """Counts kernels and bytes in this context, those inside the project's operations too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in IMPLEMENTATIONS:
            with self:
                return IMPLEMENTATIONS[func](*args, **(kwargs or {}))
        kernels, nbytes = self.kernels, self.nbytes
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if any(name in str(func) for name in MAYBE_VIEWS) and result.data_ptr() == args[0].data_ptr():
            self.kernels, self.nbytes = kernels, nbytes
        elif any(name in str(func) for name in PRODUCTS):
            self.nbytes = nbytes
        elif any(name in str(func) for name in FILLING):  # no view: fills with zeros and copies
            self.kernels += 2
            self.nbytes += sum(map(_nbytes, tree_leaves((args, result)))) + _nbytes(result)
        return result

    def launch(self, kernel: Any, grid: int, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Count a kernel of the project."""
        self.kernels += 1
        self.nbytes += sum(map(_nbytes, args))


def of_a_layer(variant: str) -> Counted:
    """One layer's share of a step."""
    more, fewer = (_of_a_step(variant, layers) for layers in (3, 2))
    return Counted(more.launches - fewer.launches, more.nbytes - fewer.nbytes)


def _of_a_step(variant: str, layers: int) -> Counted:
    kernels, fuse, terms = VARIANTS[variant]
    workload = TINY.reshaped("launches", **SIZES, num_hidden_layers=layers).of(1, TOKENS)
    model, attached = _attached(workload, fuse, terms)
    ids = batch(workload)
    if attached is not None:
        step(model, ids, attached)  # the first step chooses the probes' ε
    counted = Launches()
    with kernels_everywhere() if kernels else nullcontext(), counted, launching_by(counted.launch, "sm_90"):
        step(model, ids, attached)
    if attached is not None:
        attached.close()
    return Counted(counted.kernels, counted.nbytes)


def _attached(workload: Workload, fuse: bool, terms: dict[str, Any]) -> tuple[nn.Module, ofa.Regularizers | None]:
    # Before the kernels stop computing, since steps are recognized by a trial run.
    model = build(workload, dtype=torch.bfloat16)
    if fuse:
        assert ofa.fuse_layers(model) == {}
    return model, ofa.fused_regularizers(model, **terms) if terms else None


def rows() -> Iterator[Row]:
    """Every count, and its ratio to that with Transformers' norms."""
    origin = torch.__version__, transformers.__version__, commit()
    stream = TOKENS * SIZES["hidden_size"] * torch.bfloat16.itemsize
    counts = {variant: of_a_layer(variant) for variant in VARIANTS}
    base = counts[OWN_NORMS]
    for variant, one in counts.items():
        yield Row(variant, "launches", one.launches, "1", *origin)
        yield Row(variant, "launches_ratio", significant(one.launches / base.launches), "1", *origin)
        yield Row(variant, "traffic", significant(one.nbytes / stream), "streams", *origin)
        yield Row(variant, "traffic_ratio", significant(one.nbytes / base.nbytes), "1", *origin)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    options = parser.parse_args(arguments)
    found = list(rows())
    with writing(options.out, Row) as write:
        write(found)
    for one in found:
        print(f"{one.variant:30} {one.metric:15} {one.value:8.4g} {one.unit}")


if __name__ == "__main__":
    main()
