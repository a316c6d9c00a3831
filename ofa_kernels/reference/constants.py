"""What the closed form needs of the weights and the norm scale alone, and its gradient in γ; derived in docs/theory.md.

G = Γ² − c γγᵀ/d stands between two weights, with c = 1 behind a LayerNorm (`centred`) and 0 behind an RMSNorm. The
gradients are written by hand, because nothing of the size of a weight may be kept for them. Weights have any floating
dtype and any strides; arithmetic and results have the dtype of γ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

BLOCK = 32768
"""Elements of a weight that are worked on at a time on a CPU."""


def mlp_constants(gate: Tensor, up: Tensor | None, down: Tensor, scale: Tensor, centred: bool) -> tuple[Tensor, ...]:
    """c[k] = (W G W_d)_kk of the gate's and, for a gated MLP, the up projection's W.

    Args:
        gate, up: W_g and W_u, (f, d); no W_u for a plain MLP.
        down: W_d, (d, f).
        scale: γ, (d,), float32 or float64.
        centred: whether G has its second term.

    Returns:
        (c_g,) or (c_g, c_u), (f,) each.

    Raises:
        ValueError: shapes that do not match.
    """
    check_mlp_weights(gate, up, down, scale)
    weights, square = [weight for weight in (gate, up) if weight is not None], scale.square()
    constants = [scale.new_empty(len(weight)) for weight in weights]
    for rows in _blocks(gate):
        # Transposed while it is small enough to stay in the cache; it may be the weight itself, so not in place.
        back = down[:, rows].mT.to(scale.dtype).contiguous()
        beside = back @ scale / len(scale) if centred else None
        scaled = back * square
        for constant, weight in zip(constants, weights, strict=True):
            own = weight[rows].to(scale.dtype)
            constant[rows] = (own * scaled).sum(1)
            if beside is not None:
                constant[rows] -= (own @ scale) * beside
    return tuple(constants)


def mlp_constants_gradient(
    gate: Tensor, up: Tensor | None, down: Tensor, scale: Tensor, grads: Sequence[Tensor], centred: bool
) -> Tensor:
    """The gradient of Σ grads · `mlp_constants` in γ, (d,): 2γ ⊙ diag K − c (K + Kᵀ)γ/d, K = Σ Wᵀ diag(grad) W_dᵀ.

    Raises:
        ValueError: shapes that do not match.
    """
    check_mlp_weights(gate, up, down, scale)
    check_gradients(grads, [gate.shape[:1]] * (1 if up is None else 2))
    diagonal, crossed = scale.new_zeros(len(scale)), scale.new_zeros(len(scale))
    for rows in _blocks(gate):
        weighted = gate[rows].to(scale.dtype) * grads[0][rows].unsqueeze(1)
        if up is not None:
            weighted.addcmul_(up[rows].to(scale.dtype), grads[1][rows].unsqueeze(1))
        back = down[:, rows].mT.to(scale.dtype).contiguous()
        if centred:
            crossed += (back @ scale) @ weighted + (weighted @ scale) @ back
        diagonal += weighted.mul_(back).sum(0)
    grad = 2 * scale * diagonal
    return grad - crossed / len(scale) if centred else grad


def attention_constants(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: Tensor, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """M_q = W_q G W_o, M_k = W_k G W_o and c_v = tr(W_v G W_o) of every query head.

    Args:
        query: W_q, (H, width, d).
        key, value: W_k and W_v, (K, width, d), each shared by H / K query heads in a row.
        output: W_o, (H, d, width).
        scale: γ, (d,), float32 or float64.
        centred: whether G has its second term.

    Returns:
        (M_q, M_k, c_v), (H, width, width) twice and (H,).

    Raises:
        ValueError: shapes that do not match.
    """
    check_attention_weights(query, key, value, output, scale)
    query, key, value, output = _per_query_head(query, key, value, output, scale)
    scaled = output * scale.square().unsqueeze(1)
    to_query, to_key = query @ scaled, key @ scaled
    to_value = (value.mT * scaled).sum((1, 2))
    if centred:
        beside = (scale @ output).unsqueeze(1) / len(scale)
        to_query = to_query - (query @ scale).unsqueeze(2) * beside
        to_key = to_key - (key @ scale).unsqueeze(2) * beside
        to_value = to_value - ((value @ scale) * beside.squeeze(1)).sum(1)
    return to_query, to_key, to_value


def attention_constants_gradient(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: Tensor, grads: Sequence[Tensor], centred: bool
) -> Tensor:
    """As for an MLP, with K = Σ_h L_h W_oᵀ and L = W_qᵀ M̄_q + W_kᵀ M̄_k + c̄_v W_vᵀ; `grads` are (M̄_q, M̄_k, c̄_v).

    Raises:
        ValueError: shapes that do not match.
    """
    check_attention_weights(query, key, value, output, scale)
    heads, width = query.shape[:2]
    check_gradients(grads, [(heads, width, width), (heads, width, width), (heads,)])
    query, key, value, output = _per_query_head(query, key, value, output, scale)
    left = value.mT * grads[2].view(-1, 1, 1)
    left = left.baddbmm(query.mT, grads[0])
    left = left.baddbmm(key.mT, grads[1])
    grad = 2 * scale * (left * output).sum((0, 2))
    if centred:
        through = left @ (scale @ output).unsqueeze(2) + output @ (scale @ left).unsqueeze(2)
        grad -= through.sum(0).squeeze(1) / len(scale)
    return grad


def check_mlp_weights(gate: Tensor, up: Tensor | None, down: Tensor, scale: Tensor) -> None:
    """Refuse, with a ValueError, weights of an MLP that do not fit together."""
    inner, width = gate.shape
    if up is not None and up.shape != gate.shape:
        raise ValueError(f"up {tuple(up.shape)} and gate {tuple(gate.shape)} must have the same shape")
    if down.shape != (width, inner) or scale.shape != (width,):
        raise ValueError(
            f"down {tuple(down.shape)} and scale {tuple(scale.shape)} do not fit gate {tuple(gate.shape)}: "
            f"{(width, inner)} and {(width,)} do"
        )


def check_attention_weights(query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: Tensor) -> None:
    """Refuse, with a ValueError, weights of an attention that do not fit together."""
    heads, head, width = query.shape
    if key.shape != value.shape or key.shape[1:] != (head, width) or len(key) == 0 or heads % len(key):
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} do not fit query {tuple(query.shape)}: heads that "
            "divide its own, and the same rest"
        )
    if output.shape != (heads, width, head) or scale.shape != (width,):
        raise ValueError(
            f"output {tuple(output.shape)} and scale {tuple(scale.shape)} do not fit query {tuple(query.shape)}: "
            f"{(heads, width, head)} and {(width,)} do"
        )


def check_gradients(grads: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse, with a ValueError, gradients that are not shaped like the constants."""
    found, wanted = [tuple(grad.shape) for grad in grads], [tuple(shape) for shape in shapes]
    if found != wanted:
        raise ValueError(f"gradients {found} must be shaped like the constants, {wanted}")


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of a weight, some at a time: what is made of them stays in a cache, or at least small."""
    rows, columns = weight.shape
    size = max(1, (BLOCK if weight.device.type == "cpu" else 1 << 24) // columns)
    for first in range(0, rows, size):
        yield slice(first, first + size)


def _per_query_head(query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """All in the dtype of γ, and every query head with a key and a value head of its own."""
    groups = len(query) // len(key)
    shared = (weight.to(scale.dtype).repeat_interleave(groups, 0) for weight in (key, value))
    # A copy even in that dtype: rows of a fused weight lie apart, which products of PyTorch sum in another order.
    return query.to(scale.dtype, copy=True), *shared, output.to(scale.dtype)
