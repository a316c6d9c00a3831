"""The activation of an MLP together with what the trace of its Jacobian needs; derived in docs/theory.md."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ofa_kernels.reference.stream import check_same_shape, widen


def mlp_trace(
    gate: Tensor,
    up: Tensor | None,
    gate_trace: Tensor,
    up_trace: Tensor | None = None,
    gate_shift: Tensor | None = None,
    up_shift: Tensor | None = None,
    hidden: Tensor | None = None,
    *,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Activation of a gated or plain MLP, its change along its own input, and tr(A G) of every row.

        hidden = φ(g) ⊙ u,   tangent = φ'(g) ⊙ u ⊙ (g − b_g) + φ(g) ⊙ (u − b_u)
        trace = Σ_k φ'(g_k) u_k c_g[k] + φ(g_k) c_u[k]

    with c_g[k] = (W_g G W_d)_kk and c_u[k] = (W_u G W_d)_kk. Without `up`, u = 1 and there is nothing of c_u and b_u.

    Args:
        gate: g = W_g n + bias, (..., f), floating point; for a plain MLP its only pre-activation.
        up: u = W_u n + bias, same shape, or None.
        gate_trace, up_trace: c_g and c_u, (f,).
        gate_shift, up_shift: what of g and u does not come from n − β, (f,), or None where that is nothing.
        hidden: φ(g) ⊙ u as the model computed it, to the bit; returned instead, with the gradient of the formula.
        activation: φ, one of `ACTIVATIONS`.

    Returns:
        stack, (2, ..., f) in the dtype of `gate`: hidden and tangent, so that one product with W_d serves both; trace,
        (...), float32.

    Raises:
        ValueError: unknown `activation`, or shapes that do not match.
    """
    check_mlp(gate, up, gate_trace, up_trace, gate_shift, up_shift, hidden, activation)
    phi, slope = ACTIVATIONS[activation](widen(gate))
    g = widen(gate)
    moved = slope * (g if gate_shift is None else g - widen(gate_shift))
    value, trace = phi, slope * widen(gate_trace)
    if up is not None:
        u = widen(up)
        assert up_trace is not None
        moved = u * moved + phi * (u if up_shift is None else u - widen(up_shift))
        value, trace = phi * u, u * trace + phi * widen(up_trace)
    if hidden is not None:
        value = widen(hidden).detach() + (value - value.detach())
    return torch.stack((value, moved)).to(gate.dtype), trace.sum(-1)


def check_mlp(
    gate: Tensor,
    up: Tensor | None,
    gate_trace: Tensor,
    up_trace: Tensor | None,
    gate_shift: Tensor | None,
    up_shift: Tensor | None,
    hidden: Tensor | None,
    activation: str,
) -> None:
    """Refuse, with a ValueError, an MLP that does not fit together."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    for name, tensor in (("up", up), ("hidden", hidden)):
        if tensor is not None:
            check_same_shape(name, tensor, "gate", gate)
    if (up is None) != (up_trace is None):
        raise ValueError("up and up_trace belong together: give both for a gated MLP, neither for a plain one")
    if up is None and up_shift is not None:
        raise ValueError("up_shift without up: a plain MLP has one pre-activation")
    vectors = {"gate_trace": gate_trace, "up_trace": up_trace, "gate_shift": gate_shift, "up_shift": up_shift}
    for name, vector in vectors.items():
        if vector is not None and vector.shape != gate.shape[-1:]:
            raise ValueError(f"{name} {tuple(vector.shape)} does not fit an MLP of width {gate.shape[-1]}")


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid = torch.sigmoid(x)
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    below = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return x * below, below + x * density


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    factor, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(factor * (x + cubic * x**3))
    inner = factor * (1 + 3 * cubic * x * x)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner


def _relu(x: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(x), (x > 0).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
}
"""φ and φ' of every activation there is a closed form for; gelu_tanh is also known as gelu_new."""
