"""Directions for the forward-mode estimators: preconditioned probes, and what a norm makes of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ofa.anatomy.steps import NormView
from ofa.regularizers.estimators import Probe
from ofa_kernels import dispatch
from ofa_kernels.reference.stream import upcast


def preconditioned_probes(
    norm: NormView, stream: Tensor, probe: Probe, *, samples: int, distribution: str, norm_reads_stream: bool = True
) -> Tensor:
    """P νᵢ, or Γ νᵢ where the norm stands behind the branch: (N, ..., d), at least float32."""
    preconditioner = norm.scale
    if norm_reads_stream:
        preconditioner = preconditioner * dispatch.rstd(stream, eps=norm.eps, kind=norm.kind).unsqueeze(-1)
    keys: dict[str, Any] = {"seed": probe.seed, "step": probe.step, "probe": distribution}
    # What is displaced from zero by ε = 1 is the displacement.
    return dispatch.displace(zeros(upcast(stream)), preconditioner, samples=samples, epsilon=1.0, **keys)


def through_norm(moves: Tensor, norm: NormView, stream: Tensor) -> Tensor:
    """The norm's own tangents at the stream along each of `moves`, (N, ..., d).

    dN = γ ⊙ ( p − mean(p) − ẑ mean(ẑ p) )/σ with ẑ = (z − μ)/σ; mean(p) and μ for LayerNorm only.
    """
    z = upcast(stream)
    rstd = dispatch.rstd(stream, eps=norm.eps, kind=norm.kind).unsqueeze(-1)
    if norm.kind == "layer":
        z = z - z.mean(-1, keepdim=True)
        moves = moves - moves.mean(-1, keepdim=True)
    normalized = z * rstd
    return norm.scale * rstd * (moves - normalized * (normalized * moves).mean(-1, keepdim=True))


def zeros(like: Tensor) -> Tensor:
    """Zeros of a tensor's shape that take one row of memory."""
    return like.new_zeros(like.shape[-1]).expand(like.shape)
