"""The trace of a branch behind its norm, from what the branch knows of its own input; derived in docs/theory.md."""

from __future__ import annotations

from torch import Tensor

from ofa_kernels.reference.stream import check_norm, check_same_shape, moments, widen


def norm_trace(
    stream: Tensor,
    weight: Tensor,
    image: Tensor,
    trace: Tensor,
    *,
    eps: float,
    kind: str = "rms",
    offset: float = 0.0,
    shift: Tensor | None = None,
) -> Tensor:
    """tr(J_i P_i) of every token: the Jacobian of branch and norm, times the preconditioner.

        tr(J_i P_i) = (tr(A_i G) − ⟨ñ_i, A_i ñ_i⟩/d)/σ_i²,   ñ = (offset + weight) ⊙ (z − μ)/σ

    Args:
        stream: z, (..., d), floating point.
        weight: norm scale γ, (d,); `offset=1` for families that store γ − 1.
        image: A ñ, (..., d); with `shift`, A ñ + shift.
        trace: tr(A G), (...), float32.
        eps, kind: of the norm, see `norm_step`.
        shift: what the image holds besides A ñ (the bias of the product that made it), (d,), or None.

    Returns:
        (...), float32.

    Raises:
        ValueError: unknown `kind`, or shapes that do not match.
    """
    check_norm_trace(stream, weight, image, trace, kind, shift)
    wide = widen(stream)
    mean, rstd = moments(wide, eps, kind)
    centred = wide if mean is None else wide - mean.unsqueeze(-1)
    along = centred * (widen(weight) + offset) * (widen(image) if shift is None else widen(image) - widen(shift))
    return (trace - rstd * along.mean(-1)) * rstd.square()


def check_norm_trace(
    stream: Tensor, weight: Tensor, image: Tensor, trace: Tensor, kind: str, shift: Tensor | None
) -> None:
    """Refuse, with a ValueError, what does not fit together."""
    check_norm(stream, weight, shift, kind)
    check_same_shape("image", image, "stream", stream)
    if trace.shape != stream.shape[:-1]:
        raise ValueError(f"trace {tuple(trace.shape)} is not one number per row of {tuple(stream.shape)}")
