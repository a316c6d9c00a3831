"""Operations on rows of the residual stream: norms, probes, contractions."""

from __future__ import annotations

import torch
from torch import Tensor

from ofa_kernels.philox import probes

KINDS = ("rms", "layer")


def norm_step(
    residual: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: str = "rms",
    offset: float = 0.0,
    measured: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual addition, norm, and the squared length of the update, per row.

        z = residual + update,   normalized = (offset + weight) ⊙ (z − μ)/σ + bias,   update_sqnorm = ‖update‖²

    with μ = 0, σ² = mean(z²) + eps for `kind="rms"` and the mean and variance of the row for `kind="layer"`. The sum
    is rounded to the stream's dtype before it is normalized, as Hugging Face models do.

    Args:
        residual: the residual stream, (..., d), floating point.
        update: a branch's output, same shape; None to add nothing.
        weight: norm scale γ, (d,); `offset=1` for families that store γ − 1.
        bias: norm shift β, (d,), or None.
        eps: added to the second moment, in squared units of the stream.
        measured: False if update_sqnorm needs no gradient; the update is then not kept for the backward pass.

    Returns:
        (residual, normalized) in the stream's dtype, (..., d), and (update_sqnorm, rstd = 1/σ), (...), in float32.

    Raises:
        ValueError: unknown `kind`, or shapes that do not match.

    Example:
        >>> stream, update, scale = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.ones(8)
        >>> stream, normalized, sqnorm, rstd = ofa_kernels.norm_step(stream, update, scale, eps=1e-6)
        >>> torch.testing.assert_close(sqnorm, update.square().sum(-1))
        >>> torch.testing.assert_close(normalized, stream * rstd[..., None])
    """
    check_norm(residual, weight, bias, kind)
    if update is None:
        update_sqnorm = torch.zeros(residual.shape[:-1], dtype=opmath_dtype(residual.dtype), device=residual.device)
    else:
        check_same_shape("update", update, "residual", residual)
        update_sqnorm = squared_norm(update if measured else update.detach())
        residual = (upcast(residual) + upcast(update)).to(residual.dtype)
    normalized, rstd = _normalize(upcast(residual), weight, bias, eps, kind, offset)
    return residual, normalized.to(residual.dtype), update_sqnorm, rstd


def normalize(
    stream: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: str = "rms",
    offset: float = 0.0,
) -> Tensor:
    """The norm of `norm_step` alone: (..., d) → (..., d), in the stream's dtype.

    Raises:
        ValueError: unknown `kind`, or shapes that do not match.
    """
    return norm_step(stream, None, weight, bias, eps=eps, kind=kind, offset=offset)[1]


def squared_norm(update: Tensor) -> Tensor:
    """‖update‖² of each row: (..., d) → (...), float32."""
    return torch.linalg.vector_norm(upcast(update), dim=-1).square()


def perturb(
    stream: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: str = "rms",
    offset: float = 0.0,
    samples: int = 1,
    epsilon: float,
    seed: int,
    step: int = 0,
    probe: str = "rademacher",
    scaled: bool = True,
    unperturbed: Tensor | None = None,
) -> Tensor:
    """Normalized copies of the stream, each moved along one preconditioned probe.

        copy_i = N(z + ε P ν_i),   P = diag(offset + weight)/σ(z), or 1/σ(z) unless `scaled`

    The displacement is added in float32, since bfloat16 would round it away; each copy has its own σ.

    Args:
        stream: z, (..., d).
        epsilon: finite-difference step ε, in units of the stream per unit of Pν.
        seed, step: the probes' Philox key and counter word, see `philox.probes`.
        scaled: whether γ is a part of the displacement.
        unperturbed: the branch's input without probes, shaped like the stream, returned as the first copy.

    Returns:
        (samples, ..., d) in the stream's dtype; (1 + samples, ..., d) with `unperturbed`, in its dtype.

    Raises:
        ValueError: unknown `kind` or `probe`, or shapes that do not match.

    Example:
        >>> stream, scale = torch.randn(2, 5, 8), torch.ones(8)
        >>> ofa_kernels.perturb(stream, scale, eps=1e-6, samples=3, epsilon=1e-2, seed=0).shape
        torch.Size([3, 2, 5, 8])
    """
    check_norm(stream, weight, bias, kind)
    if unperturbed is not None:
        check_same_shape("unperturbed", unperturbed, "stream", stream)
    wide = upcast(stream)
    rstd = moments(wide, eps, kind)[1]
    direction = rstd.unsqueeze(-1)
    if scaled:
        direction = (upcast(weight) + offset) * direction
    moved = wide + epsilon * direction * _probes_like(stream, samples, seed, step, probe)
    copies = _normalize(moved, weight, bias, eps, kind, offset)[0]
    if unperturbed is None:
        return copies.to(stream.dtype)
    return torch.cat((unperturbed.unsqueeze(0), copies.to(unperturbed.dtype)))


def displace(
    stream: Tensor,
    preconditioner: Tensor,
    *,
    samples: int = 1,
    epsilon: float,
    seed: int,
    step: int = 0,
    probe: str = "rademacher",
) -> Tensor:
    """Copies of the stream moved along preconditioned probes, without a norm: z + ε p ⊙ ν_i.

    For steps whose branch reads the stream itself. `preconditioner` is the diagonal p, broadcast against (..., d).

    Returns:
        (samples, ..., d) in the stream's dtype.
    """
    moves = epsilon * upcast(preconditioner) * _probes_like(stream, samples, seed, step, probe)
    return (upcast(stream) + moves).to(stream.dtype)


def contract(
    base: Tensor, copies: Tensor, *, seed: int, step: int = 0, probe: str = "rademacher"
) -> tuple[Tensor, Tensor]:
    """Dot products of the recomputed probes with the changes they caused, νᵢᵀ(copyᵢ − base), and ‖base‖², per row.

    Args:
        base: branch output of the unperturbed stream, (..., d).
        copies: branch outputs of the perturbed copies, (samples, ..., d).

    Returns:
        (samples, ...) and (...), float32.

    Raises:
        ValueError: `copies` is not a stack of tensors shaped like `base`, or unknown `probe`.

    Example:
        >>> base = torch.randn(5, 8)
        >>> copies = torch.stack([base, 2 * base])
        >>> products, sqnorm = ofa_kernels.contract(base, copies, seed=0)
        >>> products.shape, products[0].abs().max()  # a copy that did not move has none
        (torch.Size([2, 5]), tensor(0.))
    """
    check_stack(base, copies)
    nu = _probes_like(base, copies.shape[0], seed, step, probe)
    return (nu * (upcast(copies) - upcast(base))).sum(-1), squared_norm(base)


def probed_diagonal(
    base: Tensor, copies: Tensor, weights: Tensor, *, seed: int, step: int = 0, probe: str = "rademacher"
) -> Tensor:
    """Estimate of a summed Jacobian's diagonal, Σ_t w_t Σ_i ν_i ⊙ (copy_i − base) over the tokens of each sequence.

    For copies moved by ν_i alone, E[ν ⊙ (J ν)] = diag(J) (Bekas, Kokiopoulou and Saad 2007).

    Args:
        base: branch output of the unperturbed stream, (sequences, tokens, d).
        copies: branch outputs of the perturbed copies, (samples, sequences, tokens, d).
        weights: w, one number per token, (sequences, tokens).

    Returns:
        (sequences, d), float32.

    Raises:
        ValueError: shapes that do not match, or unknown `probe`.
    """
    check_stack(base, copies)
    check_same_shape("weights", weights, "a column of base", base[..., 0])
    change = upcast(copies) - upcast(base)
    products = (_probes_like(base, copies.shape[0], seed, step, probe) * change).sum(0)
    return (upcast(weights).unsqueeze(1) @ products).squeeze(1)


def rstd(stream: Tensor, *, eps: float, kind: str = "rms") -> Tensor:
    """1/σ of each row as the norm computes it: (..., d) → (...), float32.

    Raises:
        ValueError: unknown `kind`.
    """
    _check_kind(kind)
    return moments(upcast(stream), eps, kind)[1]


def _normalize(
    wide: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str, offset: float
) -> tuple[Tensor, Tensor]:
    mean, rstd = moments(wide, eps, kind)
    centred = wide if mean is None else wide - mean.unsqueeze(-1)
    normalized = centred * rstd.unsqueeze(-1) * (upcast(weight) + offset)
    return (normalized if bias is None else normalized + upcast(bias)), rstd


def moments(wide: Tensor, eps: float, kind: str) -> tuple[Tensor | None, Tensor]:
    if kind == "rms":
        return None, torch.rsqrt(wide.square().mean(-1) + eps)
    mean = wide.mean(-1)
    return mean, torch.rsqrt((wide - mean.unsqueeze(-1)).square().mean(-1) + eps)


def _probes_like(stream: Tensor, samples: int, seed: int, step: int, probe: str) -> Tensor:
    rows, width = stream.numel() // max(stream.shape[-1], 1), stream.shape[-1]
    nu = probes(rows, width, samples=samples, seed=seed, step=step, probe=probe, device=stream.device)
    return nu.view(samples, *stream.shape).to(opmath_dtype(stream.dtype))


def check_norm(stream: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> None:
    """Raise a ValueError for an unknown kind or a weight that does not fit the stream."""
    _check_kind(kind)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != stream.shape[-1:]:
            raise ValueError(f"{name} {tuple(vector.shape)} does not fit a stream of width {stream.shape[-1]}")


def check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise a ValueError unless both shapes are equal; nothing is broadcast."""
    if tensor.shape != other.shape:
        raise ValueError(f"{name} {tuple(tensor.shape)} does not have the shape of {other_name} {tuple(other.shape)}")


def check_stack(base: Tensor, copies: Tensor) -> None:
    """Raise a ValueError unless `copies` is a stack of tensors shaped like `base`."""
    if copies.dim() == 0 or copies.shape[1:] != base.shape:
        raise ValueError(f"copies {tuple(copies.shape)} is not a stack of tensors shaped {tuple(base.shape)}")


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")


def upcast(tensor: Tensor) -> Tensor:
    return tensor.to(opmath_dtype(tensor.dtype))


def thin_product(rows: Tensor, columns: Tensor) -> Tensor:
    """A matrix product; on a CPU few columns go through the transpose, where BLAS is up to four times as fast."""
    if rows.device.type != "cpu" or columns.shape[-1] >= 16:
        return rows @ columns
    return (columns.mT @ rows.mT).mT


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    # A table, since `promote_types` goes through PyTorch's dispatcher and this is called for every tensor.
    return _WIDE.get(dtype) or torch.promote_types(dtype, torch.float32)


_WIDE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
