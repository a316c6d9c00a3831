"""`probed_diagonal` on a GPU: shapes and launches; what it computes is in `reference.probed_diagonal`."""

from __future__ import annotations

import torch
from torch import Tensor

from ofa_kernels import launch, reference
from ofa_kernels.ops.launching import as_rows, as_stack, configuration, key, multiprocessors, operation, run
from ofa_kernels.philox import check_probe


def probed_diagonal(
    base: Tensor, copies: Tensor, weights: Tensor, *, seed: int, step: int = 0, probe: str = "rademacher"
) -> Tensor:
    """As `reference.probed_diagonal`, without a derivative."""
    reference.check_stack(base, copies)
    reference.check_same_shape("weights", weights, "a column of base", base[..., 0])
    check_probe(probe)
    return call(base, copies, weights, seed, step, probe == "gaussian")


def forward(base: Tensor, copies: Tensor, weights: Tensor, seed: int, step: int, gaussian: bool) -> Tensor:
    """Launch the kernel, and add its sums over parts of a sequence."""
    from ofa_kernels.kernels.probed_diagonal import probed_diagonal_rows

    sequences, tokens, width = base.shape
    b, stack = as_rows(base, width), as_stack(copies, width)
    programs = launch.programs(sequences * tokens, multiprocessors(base.device))
    parts = min(tokens, -(-programs // max(sequences, 1)))
    sums = base.new_empty((sequences, parts, width), dtype=torch.float32)
    run(
        probed_diagonal_rows,
        sequences * parts * configuration(probed_diagonal_rows, base, width).tiles,
        base,
        width,
        b,
        stack,
        weights.reshape(-1),
        sums,
        width,
        tokens,
        parts,
        b.stride(0),
        stack.stride(0),
        stack.stride(1),
        *key(seed, step),
        SAMPLES=stack.shape[0],
        GAUSSIAN=gaussian,
    )
    return sums.sum(1)


def empty(base: Tensor, *others: object) -> Tensor:
    return base.new_empty((base.shape[0], base.shape[2]), dtype=torch.float32)


call = operation("probed_diagonal", forward, empty)
