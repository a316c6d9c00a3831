"""Launches every kernel once at small sizes that fill no block, forward and backward, for a memory checker.

compute-sanitizer --tool memcheck --error-exitcode 9 python -m benchmarks.every_kernel

Reading or writing beside a tensor shows at rows and columns that are no powers of two, where masks have to hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks import attention, constants
from benchmarks.implementations import Case, passes
from ofa_kernels.ops import attention_trace, displace, norm_trace
from ofa_kernels.ops import constants as kernels

SIZES = ((5, 96), (3, 1100))
"""Rows and columns; the second takes more than one block of columns."""
HEADS = (48, 128)
DTYPES = (torch.float32, torch.bfloat16)


def launch(device: torch.device) -> Iterator[str]:
    """Run one kernel after the other, and name what has run."""
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
            # Centred, with a shift, and of two dtypes, which no operation that is timed is.
            image, trace = (torch.randn(*shape, device=device) for shape in ((rows, width), (rows,)))
            given = stream, scale, image, trace
            norm_trace.norm_trace(*given, eps=1e-5, kind="layer", shift=scale.detach()).sum().backward()
            yield f"norm_trace {rows}x{width} {dtype}"
    for width in HEADS:
        for dtype in DTYPES:
            case = replace(attention.TINY, width=width, tokens=37, dtype=dtype)
            given = attention.draw(case, device)
            leaves = [tensor.requires_grad_() for tensor in given.tensors]
            settings = {"scale": width**-0.5, "causal": True, "rotary": given.rotary}
            shifts = {
                f"{name}_shift": torch.randn(heads.shape[1], width, device=device)
                for name, heads in zip(("query", "key", "value"), leaves, strict=False)
            }
            for words, options in (("", settings), (" with shifts", settings | shifts)):
                results = attention_trace.attention_trace(*leaves, **options)
                torch.autograd.grad(results, leaves, [torch.randn_like(result) for result in results])
                yield f"attention_trace heads of {width} {dtype}{words}"
    for branch in constants.BRANCHES:
        for dtype in DTYPES:
            for centred in (False, True):
                case = replace(constants.TINY, width=70, inner=37, head=24, dtype=dtype)
                for call in constants.directions(
                    kernels, branch, constants.draw(branch, case, device), centred
                ).values():
                    call()
                yield f"{branch}_constants {'layer' if centred else 'rms'} {dtype}"


def main() -> None:
    """Launch them all on the GPU, or in Triton's interpreter where TRITON_INTERPRET=1 asks for it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = list(launch(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{len(names)} calls on {device.type}: every kernel, forward and backward")


if __name__ == "__main__":
    main()
