"""The paper's estimator: probes and a finite difference, all probes in one batch with the real pass.

    tr(J P) ≈ 1/(εN) Σᵢ νᵢᵀ(F(Z + εPνᵢ) − F(Z))

for random νᵢ with E[ννᵀ] = I (Hutchinson 1990). Where the branch reads the norm's output, its input is the norm of the
displaced stream. Where the norm stands behind the branch, P = Γ/σ has a σ that is known only afterwards; since σ is
one number per token, tr(J Γ/σ) = E[(ν/σ)ᵀ J Γν], and the rows are divided by σ when they come out.

Works for any architecture. Error: the probes' variance, and O(ε) curvature against O(1/ε) rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ofa.anatomy import Branch, NormView
from ofa.estimators import Handle, Leaving, Probe
from ofa_kernels import dispatch

EPSILON = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""Default finite-difference step by the stream's dtype; see docs/theory.md, "Choosing ε"."""


@dataclass(frozen=True)
class Hutchinson:
    """N probes by finite differences; `epsilon=None` chooses the step by the stream's dtype."""

    copies: int = 1
    epsilon: float | None = None
    probe: str = "rademacher"
    name: str = "hutchinson"

    def attach(self) -> tuple[Handle, ...]:
        """No hooks of its own."""
        return ()

    def begin(self) -> None:
        """Nothing to prepare: probes are functions of their keys."""

    def abandon(self) -> None:
        """Nothing to let go of."""

    def enter(self, branch: Branch, norm: NormView, stream: Tensor, entering: Tensor, probe: Probe) -> Tensor:
        """The branch's input with `copies` displaced inputs behind it, (1 + copies)·B along the first dimension."""
        keys = self._keys(stream, probe)
        if branch.reads == "normalized":
            settings = {"eps": norm.eps, "kind": norm.kind, "offset": norm.offset, **keys}
            return dispatch.perturb(stream, norm.weight, norm.bias, **settings, undisturbed=entering).flatten(0, 1)
        copies = dispatch.displace(stream, self._preconditioner(branch, norm, stream), **keys)
        return torch.cat((entering.unsqueeze(0), copies.to(entering.dtype))).flatten(0, 1)

    def leave(self, branch: Branch, norm: NormView, stream: Tensor, leaving: Tensor, probe: Probe) -> Leaving:
        """The real output, and νᵀΔ of each probe and row of the stream; the trace is their mean over ε."""
        outputs = leaving.unflatten(0, (1 + self.copies, -1))
        real, copies = outputs[0], outputs[1:]
        keys: dict[str, Any] = {"seed": probe.seed, "step": probe.step, "probe": self.probe}
        products, sqnorm = dispatch.contract(real, copies, **keys)
        if branch.writes == "stream":
            # The copies still hold their own displaced stream; F is what was added to it, so tr(P) goes off again.
            moved = dispatch.displace(stream, self._preconditioner(branch, norm, stream), **self._keys(stream, probe))
            products = products - dispatch.contract(stream, moved, **keys)[0]
        return Leaving(real, sqnorm, products, 1.0 / (self.copies * self._epsilon(stream)))

    def _preconditioner(self, branch: Branch, norm: NormView, stream: Tensor) -> Tensor:
        if not branch.norm_reads_stream:
            return norm.scale
        return norm.scale * dispatch.rstd(stream, eps=norm.eps, kind=norm.kind).unsqueeze(-1)

    def _keys(self, stream: Tensor, probe: Probe) -> dict[str, Any]:
        return {
            "samples": self.copies,
            "epsilon": self._epsilon(stream),
            "seed": probe.seed,
            "step": probe.step,
            "probe": self.probe,
        }

    def _epsilon(self, stream: Tensor) -> float:
        return self.epsilon if self.epsilon is not None else EPSILON[_branch_dtype(stream)]


def _branch_dtype(stream: Tensor) -> torch.dtype:
    """The dtype a branch computes in: the stream's own, or autocast's where that is on."""
    device = stream.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else stream.dtype
