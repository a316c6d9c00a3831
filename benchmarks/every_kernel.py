"""Launches every kernel once at small sizes that fill no block, forward and backward, for a memory checker.

compute-sanitizer --tool memcheck --error-exitcode 9 python -m benchmarks.every_kernel

Accesses outside a tensor appear at rows and columns that are not powers of two, where kernels need masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks import curvature_kernels
from benchmarks.implementations import Case, passes
from ofa_kernels.ops import branch_diagonal, displace

SIZES = ((5, 96), (3, 1100))
"""Rows and columns; the second takes more than one block of columns."""
HEADS = (48, 128)
DTYPES = (torch.float32, torch.bfloat16)


def launch(device: torch.device) -> Iterator[str]:
    """Run one kernel after the other, printing their names."""
    for one in passes((1, 3)):
        for rows, width in SIZES:
            for dtype in DTYPES:
                one.operation.triton.prepare(*one.draw(Case(rows, width, dtype, device)))()
                yield f"{one.label} {rows}x{width} {dtype}"
    for rows, width in SIZES:
        for dtype in DTYPES:
            stream = torch.randn(rows, width, dtype=dtype, device=device, requires_grad=True)
            scale = torch.rand(width, device=device, requires_grad=True)
            displace.displace(stream, scale, samples=3, epsilon=0.1, seed=7).sum().backward()
            yield f"displace {rows}x{width} {dtype}"
    with torch.no_grad():
        yield from _curvature(device)


def _curvature(device: torch.device) -> Iterator[str]:
    for head in HEADS:
        for dtype in DTYPES:
            case = replace(curvature_kernels.TINY, width=70, inner=37, head=head, tokens=37, dtype=dtype)
            for name, (call, _) in curvature_kernels.calls(curvature_kernels.kernels(), case, device).items():
                call()
                yield f"{name} heads of {head} {dtype}"
            # The kernel that only a LayerNorm needs.
            weights = [torch.randn(37, 70, device=device).to(dtype), torch.randn(70, 37, device=device).to(dtype)]
            sums, scale = torch.randn(2, 37, device=device), torch.randn(70, device=device)
            branch_diagonal.mlp_diagonal(weights[:1], weights[1], [sums], scale)
            yield f"mlp_diagonal with an image {dtype}"


def main() -> None:
    """Launch all kernels on the GPU, or in Triton's interpreter with TRITON_INTERPRET=1."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = list(launch(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{len(names)} calls on {device.type}: every kernel, forward and backward")


if __name__ == "__main__":
    main()
