"""The launches that stand for all others: every operation, forward and backward, on tensors without data.

Whatever these launch is what the run time launches for such tensors, because it is the same code that launches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ofa_kernels.ops import contract, displace, norm_step, perturb, step_boundary

WIDTHS = (1024, 2048, 4096, 8192, 16384)
"""One width of each tile; every width up to it and above half of it shares its binaries if 16 divides it."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NORMS = {"rms": ("rms", 0.0, False), "rms 1+w": ("rms", 1.0, False), "layer+bias": ("layer", 0.0, True)}
SAMPLES = (1, 4)


@dataclass(frozen=True)
class Case:
    """One way to call the operations; `launch` goes through each of them once, forward and backward."""

    width: int
    dtype: str
    norm: str
    samples: int

    @property
    def label(self) -> str:
        """The case in words."""
        return f"{self.width} {self.dtype} {self.norm} N={self.samples}"

    def launch(self) -> None:
        """Call what the operations' registered implementations are, on tensors of the meta device."""
        for call in _calls(self):
            call()


def cases(widths: Sequence[int], dtypes: Sequence[str], norms: Sequence[str], samples: Sequence[int]) -> list[Case]:
    """All combinations."""
    return [Case(*values) for values in product(widths, dtypes, norms, samples)]


def _calls(case: Case) -> Iterator[Callable[[], object]]:
    kind, offset, biased = NORMS[case.norm]
    dtype, n, rows = DTYPES[case.dtype], case.samples, 256
    z = torch.empty(rows, case.width, dtype=dtype, device="meta")
    stack, front = z.expand(n, *z.shape).contiguous(), z.expand(n + 1, *z.shape).contiguous()
    row = torch.empty(rows, dtype=torch.float32, device="meta")
    weight = torch.empty(case.width, dtype=torch.float32, device="meta")
    bias: Tensor | None = weight if biased else None
    norm = 1e-6, kind == "layer", offset
    tail = 0, 0, False
    for update in (z, None):
        yield lambda update=update: norm_step.forward(z, update, weight, bias, *norm)
    for grads in ((z, z, row, None), (None, z, None, None), (z, z, None, None)):
        yield lambda grads=grads: norm_step.backward(z, z, weight, row, row, *grads, *norm[1:], biased)
    if case.width <= 16384:
        yield lambda: perturb.forward(z, z, weight, bias, *norm, n, 0.1, *tail)
        yield lambda: perturb.backward(z, weight, stack, *norm, 0.1, *tail, biased)
        yield lambda: step_boundary.forward(z, z, stack, weight, bias, *norm, n, 0.1, *tail)
        grads = z, front, row, torch.empty(n, rows, device="meta")
        yield lambda: step_boundary.backward(z, z, weight, *grads, n, *norm, 0.1, *tail, biased)
    yield lambda: displace.forward(z, z, n, 0.1, *tail)
    yield lambda: displace.backward(stack, 0.1, *tail, True)
    yield lambda: contract.forward(z, stack, *tail)
    yield lambda: contract.backward(z, torch.empty(n, rows, device="meta"), row, n, *tail)
    yield lambda: contract.forward(z, stack[:0], *tail)
    yield lambda: contract.backward(z, None, row, 0, *tail)
