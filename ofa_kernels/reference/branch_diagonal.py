"""Traces and diagonals of summed own-token Jacobians, from token sums and weights; see docs/theory.md.

Ā = Σ_i w_i A_i of a branch is a product of its weights with the token sums in between. One read of the weights gives
its diagonal D_k = Ā_kk and, for a LayerNorm, its image Āγ; another one tr(Ā G) for G = diag(e) − γγᵀ/d. Weights have
any floating dtype and any strides; arithmetic and results have the dtype of the sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

TRANSPOSED = 1 << 20
"""Elements of W_d that are transposed at a time on a CPU: long rows are read in order, and the copy stays small."""

BLOCK = 1 << 18
"""Elements of W_d per product on a CPU, few enough to stay in the cache."""


def mlp_diagonal(
    weights: Sequence[Tensor], down: Tensor, sums: Sequence[Tensor], scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """D = Σ (W_d ⊙ Wᵀ) p of every sequence, and Āγ = W_d Σ p ⊙ (W γ), over the input projections W of an MLP.

    Args:
        weights: W_g and, for a gated MLP, W_u, (f, d) each.
        down: W_d, (d, f).
        sums: p_g and p_u of `mlp_curvature`, (B, f) each.
        scale: γ, (d,), to compute Āγ; or None.

    Returns:
        D, (B, d), and Āγ, (B, d), or None.

    Raises:
        ValueError: shapes that do not match.

    Example:
        >>> weight, down, sums = torch.randn(16, 8), torch.randn(8, 16), torch.randn(1, 16)
        >>> diagonal, _ = ofa_kernels.mlp_diagonal([weight], down, [sums])
        >>> torch.testing.assert_close(diagonal[0], (down @ torch.diag(sums[0]) @ weight).diagonal())
    """
    check_mlp_weights(weights, down, sums)
    (inner, width), dtype = weights[0].shape, sums[0].dtype
    diagonal, image = sums[0].new_zeros(len(sums[0]), width), None
    for outer in _blocks(weights[0], slice(0, inner), TRANSPOSED):
        transposed = down[:, outer].mT.contiguous()
        for rows in _blocks(weights[0], outer, BLOCK):
            back, along = transposed[rows.start - outer.start : rows.stop - outer.start].to(dtype), None
            for weight, part in zip(weights, sums, strict=True):
                own, p = weight[rows].to(dtype), part[:, rows]
                diagonal = torch.addmm(diagonal, p, own * back)
                if scale is not None:
                    along = p * (own @ scale) + (0 if along is None else along)
            if along is not None:
                image = along @ back + (0 if image is None else image)
    return diagonal, image


def attention_trace(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    factor: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """tr(Ā G) of every sequence: Σ_h tr(C W_q G W_o) + tr(K W_k G W_o) + ā tr(W_v G W_o), (B,).

    Args:
        query: W_q, (H, width, d).
        key, value: W_k and W_v, (K, width, d), each shared by H / K query heads in a row.
        output: W_o, (H, d, width).
        sums: C, K and ā of `attention_curvature`, (B, H, width, width) twice and (B, H).
        factor: e, (d,): G = diag(e), minus γγᵀ/d if γ is given.
        scale: γ, (d,), of a LayerNorm before the branch; or None.

    Returns:
        (B,), float32 or wider.

    Raises:
        ValueError: shapes that do not match.

    Example:
        >>> query, key, value = torch.randn(3, 1, 2, 5, 4)  # one sequence, two heads, five tokens
        >>> attends = ofa_kernels.reference.Attends(scale=0.5, causal=True)
        >>> output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5)
        >>> sums = ofa_kernels.attention_curvature(query, key, value, output, torch.full((1, 5), 0.2), attends)
        >>> inputs, outputs = torch.randn(2, 4, 8), torch.randn(2, 8, 4)  # projections of both heads, width 8
        >>> ofa_kernels.attention_trace(inputs, inputs, inputs, outputs, sums[:3], torch.ones(8)).shape
        torch.Size([1])
    """
    check_attention_weights(query, key, value, output, factor)
    to_query, to_key, to_value = sums
    query, key, value, output = (weight.to(to_query.dtype) for weight in (query, key, value, output))
    scaled = output * factor.unsqueeze(1)
    if scale is not None:
        scaled = scaled - scale.unsqueeze(1) * (scale @ output).unsqueeze(1) / len(scale)
    groups = len(query) // len(key)
    of_query = query @ scaled
    of_key = (key @ _shared(scaled, groups)).unflatten(-1, (groups, -1)).transpose(1, 2)
    of_value = (value.unsqueeze(1) * scaled.mT.unflatten(0, (-1, groups))).sum((2, 3))
    trace = to_query.flatten(1) @ of_query.mT.flatten() + to_key.flatten(1) @ of_key.mT.flatten()
    return trace + to_value @ of_value.flatten()


def attention_diagonal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """D_k, the row sums of W_o ⊙ (C W_q + K W_k + ā W_v)ᵀ over the heads, and Āγ: (d,) each.

    Args:
        query, key, value, output: as for `attention_trace`.
        sums: C, K and ā of one sequence, or a weighted sum over sequences: (H, width, width) twice and (H,).
        scale: γ, (d,), to compute Āγ; or None.

    Returns:
        D, and Āγ or None.

    Raises:
        ValueError: shapes that do not match.

    Example:
        >>> query, key, value = torch.randn(3, 1, 2, 5, 4)  # one sequence, two heads, five tokens
        >>> attends = ofa_kernels.reference.Attends(scale=0.5, causal=True)
        >>> output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5)
        >>> sums = ofa_kernels.attention_curvature(query, key, value, output, torch.full((1, 5), 0.2), attends)
        >>> inputs, outputs = torch.randn(2, 4, 8), torch.randn(2, 8, 4)  # projections of both heads, width 8
        >>> of_one = tuple(part[0] for part in sums[:3])
        >>> diagonal, _ = ofa_kernels.attention_diagonal(inputs, inputs, inputs, outputs, of_one)
        >>> trace = ofa_kernels.attention_trace(inputs, inputs, inputs, outputs, sums[:3], torch.ones(8))
        >>> torch.testing.assert_close(diagonal.sum(), trace[0], rtol=1e-4, atol=1e-5)
    """
    check_attention_weights(query, key, value, output, scale)
    to_query, to_key, to_value = sums
    query, key, value, output = (weight.to(to_query.dtype) for weight in (query, key, value, output))
    groups = len(query) // len(key)
    of_query = to_query.mT @ output.mT
    of_key = to_key.unflatten(0, (-1, groups)).flatten(1, 2).mT @ _shared(output, groups).mT
    of_value = torch.einsum("kg,kgdw->kdw", to_value.view(-1, groups), output.unflatten(0, (-1, groups))).mT
    diagonal = (of_query * query).sum((0, 1)) + (of_key * key).sum((0, 1)) + (of_value * value).sum((0, 1))
    if scale is None:
        return diagonal, None
    images = (weight @ scale for weight in (query, key, value))
    q, k, v = (image.repeat_interleave(len(query) // len(image), 0).unsqueeze(-1) for image in images)
    along = to_query @ q + to_key @ k + to_value.view(-1, 1, 1) * v
    return diagonal, (output @ along).sum(0).squeeze(-1)


def check_mlp_weights(weights: Sequence[Tensor], down: Tensor, sums: Sequence[Tensor]) -> None:
    """Raise a ValueError unless weights and sums are of one MLP."""
    inner, width = weights[0].shape
    fits = all(w.shape == (inner, width) for w in weights) and all(p.shape[1] == inner for p in sums)
    if down.shape != (width, inner) or not fits or len(weights) != len(sums):
        shapes = [tuple(x.shape) for x in (*weights, down, *sums)]
        raise ValueError(f"weights and sums of an MLP do not fit together: {shapes}")


def check_attention_weights(query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: Tensor | None) -> None:
    """Raise a ValueError unless the weights are of one attention."""
    heads, head, width = query.shape
    if key.shape[1:] != (head, width) or len(key) == 0 or heads % len(key) or len(value) != len(key):
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} do not fit query {tuple(query.shape)}; their heads "
            "must divide its heads, and key must have its other dimensions"
        )
    if output.shape != (heads, width, value.shape[1]) or (scale is not None and scale.shape != (width,)):
        raise ValueError(f"output {tuple(output.shape)} does not fit query {tuple(query.shape)}")


def _blocks(weight: Tensor, rows: slice, elements: int) -> Iterator[slice]:
    size = max(1, (elements if weight.device.type == "cpu" else 1 << 24) // weight.shape[1])
    for first in range(rows.start, rows.stop, size):
        yield slice(first, min(first + size, rows.stop))


def _shared(output: Tensor, groups: int) -> Tensor:
    """W_o of the query heads that share a key head, side by side: (H, d, width) → (K, d, H/K · width)."""
    heads, rows, _ = output.shape
    return output.transpose(0, 1).reshape(rows, heads // groups, -1).transpose(0, 1)
