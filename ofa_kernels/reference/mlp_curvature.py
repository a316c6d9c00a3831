"""Token sums of the own-token Jacobian of an MLP; derived in docs/theory.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ofa_kernels.reference.stream import check_same_shape, thin_product, upcast

BLOCK = 1 << 18
"""Pre-activations per block on a CPU, few enough that intermediates stay in the cache."""


def mlp_curvature(
    gate: Tensor,
    up: Tensor | None,
    weights: Tensor,
    *,
    activation: str,
    read: Tensor | None = None,
    gate_shift: Tensor | None = None,
    up_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sums over a sequence's tokens of the slopes of φ(g) ⊙ u, and the change of φ(g) ⊙ u along the branch's input.

        p_g = Σ_i w_i φ'(g_i) ⊙ u_i,   p_u = Σ_i w_i φ(g_i):   Σ_i w_i A_i = W_d ( diag(p_g) W_g + diag(p_u) W_u )
        moved_i = read · ( φ'(g_i) ⊙ u_i ⊙ (g_i − b_g) + φ(g_i) ⊙ (u_i − b_u) )

    Without `up`, u = 1 and the terms with p_u and b_u vanish.

    Args:
        gate: g = W_g n + bias, (B, T, f), floating point; for a plain MLP its only pre-activation.
        up: u = W_u n + bias, same shape, or None.
        weights: w, (B, T); 0 at padding.
        activation: φ, one of `ACTIVATIONS`.
        read: rows of W_d, (B or 1, m, f), onto which the change is projected; None to leave it out.
        gate_shift, up_shift: b_g and b_u, the parts of g and u that do not depend on n − β, (f,); None for 0.

    Returns:
        p_g and p_u, (B, f), and moved, (B, T, m), in float32 or wider; p_u is None without `up`, moved without `read`.
        Differentiable.

    Raises:
        ValueError: unknown `activation`, or shapes that do not match.

    Example:
        >>> gate, up, weights = torch.randn(1, 5, 16), torch.randn(1, 5, 16), torch.full((1, 5), 0.2)
        >>> gate_sums, up_sums, moved = ofa_kernels.mlp_curvature(gate, up, weights, activation="silu")
        >>> torch.testing.assert_close(up_sums, 0.2 * torch.nn.functional.silu(gate).sum(1))
        >>> gate_sums.shape, moved
        (torch.Size([1, 16]), None)
    """
    check_mlp(gate, up, weights, activation)
    sums: list[tuple[Tensor, ...]] = []
    moved: list[Tensor] = []
    for tokens in _blocks(gate):
        w = upcast(weights[:, tokens]).unsqueeze(1)
        g, u = gate[:, tokens], None if up is None else up[:, tokens]
        slopes = mlp_slopes(g, u, activation)
        sums.append(tuple((w @ part).squeeze(1) for part in slopes if part is not None))
        if read is not None:
            moved.append(thin_product(_change(slopes, g, u, gate_shift, up_shift), upcast(read).mT))
    totals = [torch.stack(parts).sum(0) if len(sums) > 1 else parts[0] for parts in zip(*sums, strict=True)]
    return totals[0], totals[1] if up is not None else None, torch.cat(moved, 1) if read is not None else None


def mlp_slopes(
    gate: Tensor, up: Tensor | None, activation: str, limit: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """The factors of δg and δu in the change of φ(g) ⊙ u: φ'(g) ⊙ u, and φ(g) for a gated MLP.

    With gpt-oss' `limit`, of φ(min(g, limit)) ⊙ (clamp(u, ±limit) + 1).
    """
    g, phi = upcast(gate), ACTIVATIONS[activation]
    if up is None:
        return phi.backward(torch.ones_like(g), g), None
    u = upcast(up)
    if limit is None:
        return phi.backward(u, g), phi.forward(g)
    clamped = g.clamp(max=limit)
    slope = phi.backward(u.clamp(-limit, limit) + 1, clamped) * (g <= limit)
    return slope, phi.forward(clamped) * (u.abs() <= limit)


def check_mlp(gate: Tensor, up: Tensor | None, weights: Tensor, activation: str) -> None:
    """Raise a ValueError for an unknown activation or shapes that are not of one MLP."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if up is not None:
        check_same_shape("up", up, "gate", gate)
    if gate.dim() != 3 or weights.shape != gate.shape[:2]:
        raise ValueError(f"weights {tuple(weights.shape)} are not one number per token of gate {tuple(gate.shape)}")


def _change(
    slopes: tuple[Tensor, Tensor | None],
    gate: Tensor,
    up: Tensor | None,
    gate_shift: Tensor | None,
    up_shift: Tensor | None,
) -> Tensor:
    """The change of φ(g) ⊙ u along the branch's input."""
    change = slopes[0] * _unshifted(gate, gate_shift)
    if up is None or slopes[1] is None:
        return change
    return torch.addcmul(change, slopes[1], _unshifted(up, up_shift))


def _unshifted(rows: Tensor, shift: Tensor | None) -> Tensor:
    return upcast(rows) if shift is None else upcast(rows) - upcast(shift)


def _blocks(gate: Tensor) -> Iterator[slice]:
    sequences, tokens, inner = gate.shape
    size = max(1, BLOCK // (sequences * inner)) if gate.device.type == "cpu" else tokens
    for start in range(0, tokens, size):
        yield slice(start, start + size)


class Activation(NamedTuple):
    """φ, and its backward pass: (gradient, x) → gradient ⊙ φ'(x)."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and (x.requires_grad or gradient.requires_grad)):
        return torch.ops.aten.silu_backward(gradient, x)
    sigmoid = torch.sigmoid(x)  # PyTorch's own operation has no derivative
    return gradient * sigmoid * (1 + x * (1 - sigmoid))


def _quick_gelu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(1.702 * x)
    return gradient * (sigmoid + 1.702 * x * sigmoid * (1 - sigmoid))


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, _silu_backward),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(
        partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")
    ),
    "relu": Activation(F.relu, lambda gradient, x: torch.ops.aten.threshold_backward(gradient, x, 0)),
    "quick_gelu": Activation(lambda x: x * torch.sigmoid(1.702 * x), _quick_gelu_backward),
}
"""Every activation with a closed form; gelu_tanh is also known as gelu_new."""
