"""The trace of a branch, and its derivative in γ with the curvature held fixed.

With Ā = Σ_i w_i A_i over the tokens of a sequence, D its diagonal, ẑ and ŷ the normalized rows of the norms before and
after the branch, and f, p, q products of their scales (γ and γ', 1 without a norm):

    ∂tr/∂γ = 2 f ⊙ ( p ⊙ D − c Āγ/d − X ),      tr = ½ q·∂tr/∂γ

X collects the terms that need A_i token by token: A_iñ_i of the radial term, and A_iᵀŷ_i of a norm after the branch.
Derived in docs/theory.md, "The curvature held fixed".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ofa.anatomy.steps import NormView
from ofa.errors import InputError
from ofa.regularizers.closed_form.modules import AttentionModules, ExpertsModules, MlpModules
from ofa.regularizers.closed_form.recognize import (
    AttentionSpec,
    ExpertsSpec,
    MlpSpec,
    Recognized,
    call_of,
    entering_heads,
    expert_rows,
    head_norm,
    heads_of,
    rotary_of,
)
from ofa.regularizers.closed_form.taps import AttentionSeen, ExpertsSeen, MlpSeen
from ofa.regularizers.objectives import BranchTrace
from ofa_kernels import dispatch, reference
from ofa_kernels.reference import AttentionSums, HeadNorm, Move, Rotary, per_query_head
from ofa_kernels.reference.stream import moments, thin_product, upcast

RADIAL = ("channels", "exact", "none")
"""How to compute the terms that need A_i token by token: through a few channels, through all of them, or not."""

CHANNELS = 8
"""Channels of a sequence that hold most of its radial term: those with the largest Σ_i w_i ẑ_ik²."""


@dataclass(frozen=True)
class NormAt:
    """A norm of a branch and its input, (B, T, d)."""

    norm: NormView
    reads: Tensor

    @property
    def scale(self) -> Tensor:
        """γ, (d,), in float32 or wider."""
        return self.norm.scale

    def hat(self) -> tuple[Tensor, Tensor]:
        """The normalized rows without scale and shift, (B, T, d), and 1/σ, (B, T)."""
        wide = upcast(self.reads)
        if self.norm.rstd is None:
            mean, rstd = moments(wide, self.norm.eps, self.norm.kind)
        else:
            rstd = self.norm.rstd.view(wide.shape[:-1])
            mean = wide.mean(-1) if self.norm.kind == "layer" else None
        return (wide if mean is None else wide - mean.unsqueeze(-1)) * rstd.unsqueeze(-1), rstd


class Sums(Protocol):
    """Σ_i w_i A_i of every sequence, reduced to what traces and diagonals need."""

    moved: Tensor | None
    """A_iñ_i of every token in the requested channels, (B, T, m)."""

    def trace(self, factor: Tensor, scale: Tensor | None) -> Tensor:
        """Σ_k e_k D_k for e = `factor`, minus γᵀĀγ/d if γ is given, (B,)."""
        ...

    def diagonal(self, slopes: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """D and Āγ of Σ_b slopes_b Ā_b, (d,) each."""
        ...


class Body(Protocol):
    """The function of a branch between its norms, whose own-token Jacobians are A_i."""

    def sums(self, weights: Tensor, read: Tensor | None, beta: Tensor | None) -> Sums:
        """The sums for token weights (B, T), with A_iñ_i in the channels `read`, (B, m); an empty `read` means all."""
        ...

    def adjoint(self, rows: Tensor) -> Tensor:
        """A_iᵀ y_i of every token, (B, T, d)."""
        ...


def branch_trace(
    body: Body, before: NormAt | None, after: NormAt | None, share: Tensor, radial: str = "exact"
) -> BranchTrace:
    """The trace of a branch from its activations.

    Args:
        body: the function between the norms.
        before: the norm before the branch, or None; P is that of this norm if there is one.
        after: the norm after the branch, or None.
        share: weights of the tokens, (B, T), that add up to 1 over the real tokens of a sequence.
        radial: one of `RADIAL`.
    """
    weights, beta = share, None
    one = torch.ones((), dtype=upcast(share).dtype, device=share.device)
    factor, own, along = one, one, one  # f, p and q of the module's docstring
    scale = None
    hat = back = None
    if before is not None:
        hat, rstd = before.hat()
        weights, beta = weights * rstd.square(), before.norm.bias
        own = along = before.scale
        scale = own if before.norm.kind == "layer" else None
    if after is not None:
        back, rstd = after.hat()
        weights = weights * (rstd if before is not None else rstd.square())
        factor = after.scale
        along = factor if before is None else along
    read = None if before is None or radial == "none" else _channels(hat, weights, radial)
    sums = body.sums(weights, read, beta)
    correction = _correction(body, sums, hat, back, weights, read, own, radial)
    product = factor * along
    values = sums.trace(product * own, scale)
    if correction is not None:
        values = values - (correction * product).sum(-1)

    def gradient(slopes: Tensor) -> Tensor:
        diagonal, image = sums.diagonal(slopes, scale)
        result = own * diagonal
        if image is not None:
            result = result - image / len(result)
        if correction is not None:
            result = result - slopes @ correction
        return 2 * factor * result

    return BranchTrace(values, gradient)


def _channels(hat: Tensor | None, weights: Tensor, radial: str) -> Tensor:
    assert hat is not None
    if radial == "exact" or hat.shape[-1] <= CHANNELS:
        return torch.empty(0, dtype=torch.long, device=hat.device)
    lengths = (weights.unsqueeze(1) @ hat.square()).squeeze(1)
    return lengths.topk(CHANNELS, dim=-1).indices


def _correction(
    body: Body,
    sums: Sums,
    hat: Tensor | None,
    back: Tensor | None,
    weights: Tensor,
    read: Tensor | None,
    own: Tensor,
    radial: str,
) -> Tensor | None:
    """X of the module's docstring, (B, d)."""
    if radial == "none":
        return None
    row, width = weights.unsqueeze(1), (hat if back is None else back).shape[-1]  # type: ignore[union-attr]
    total = None
    if read is not None:
        assert hat is not None
        assert sums.moved is not None
        if read.numel() == 0:
            total = (row @ (sums.moved * hat)).squeeze(1)
        else:
            chosen = hat.gather(2, read.unsqueeze(1).expand(-1, hat.shape[1], -1))
            total = hat.new_zeros(len(hat), width).scatter(1, read, (row @ (sums.moved * chosen)).squeeze(1))
    if back is not None:
        pulled = body.adjoint(back)
        turned = own * (row @ (back * pulled)).squeeze(1)
        total = turned if total is None else total + turned
        if hat is not None:
            # ŷᵀA_iñ_i, with ñ = γ ⊙ ẑ: `recognize` allows only RMSNorms here.
            both = (pulled * hat * own).sum(-1, keepdim=True) / width
            total = total - (row @ (back * hat * both)).squeeze(1)
    return None if total is None else total / width


def body_of(recognized: Recognized, seen: Any) -> Body:
    """The body of a recognized branch, from the activations that its tap collected."""
    modules, spec = recognized.modules, recognized.spec
    if isinstance(modules, MlpModules):
        assert isinstance(spec, MlpSpec)
        return MlpBody(modules, spec, seen)
    if isinstance(modules, ExpertsModules):
        assert isinstance(spec, ExpertsSpec)
        return ExpertsBody(modules, spec, seen)
    assert isinstance(spec, AttentionSpec)
    return AttentionBody(modules, spec, seen)


class _DiagonalSums:
    """Sums whose diagonals are known for every sequence: D, (B, d), and if γ is given Āγ, (B, d)."""

    def __init__(
        self, diagonals: Callable[[Tensor | None], tuple[Tensor, Tensor | None]], moved: Tensor | None
    ) -> None:
        self._diagonals = diagonals
        self.moved = moved
        self._found: tuple[Tensor, Tensor | None] | None = None

    def trace(self, factor: Tensor, scale: Tensor | None) -> Tensor:
        self._found = diagonal, image = self._diagonals(scale)
        trace = diagonal @ factor.expand(diagonal.shape[1])
        return trace if image is None or scale is None else trace - image @ scale / len(scale)

    def diagonal(self, slopes: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        diagonal, image = self._found or self._diagonals(scale)
        return slopes @ diagonal, None if image is None else slopes @ image


class MlpBody:
    """W_d(φ(g) ⊙ u)."""

    def __init__(self, modules: MlpModules, spec: MlpSpec, seen: MlpSeen) -> None:
        self._modules, self._spec, self._seen = modules, spec, seen

    def sums(self, weights: Tensor, read: Tensor | None, beta: Tensor | None) -> Sums:
        seen, shape = self._seen, weights.shape
        down = self._modules.down.weight()
        up = None if seen.up is None else seen.up.view(*shape, -1)
        gate_shift, up_shift = (None, None) if read is None else self._shifts(beta)
        to_gate, to_up, moved = dispatch.mlp_curvature(
            seen.gate.view(*shape, -1),
            up,
            weights,
            activation=self._spec.activation,
            read=_rows(down, read),
            gate_shift=gate_shift,
            up_shift=up_shift,
        )
        parts = (to_gate,) if to_up is None else (to_gate, to_up)

        def diagonals(scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return dispatch.mlp_diagonal(self._inputs(), down, parts, scale)

        return _DiagonalSums(diagonals, moved)

    def adjoint(self, rows: Tensor) -> Tensor:
        seen = self._seen
        pulled = rows @ upcast(self._modules.down.weight())
        up = None if seen.up is None else seen.up.view(pulled.shape)
        slopes = reference.mlp_slopes(seen.gate.view(pulled.shape), up, self._spec.activation)
        given = zip(slopes, self._inputs(), strict=False)
        parts = [(slope * pulled) @ upcast(weight) for slope, weight in given if slope is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _inputs(self) -> tuple[Tensor, ...]:
        gate = self._modules.gate.weight()
        if self._modules.fused:
            return tuple(gate.chunk(2, 0))
        return (gate,) if self._modules.up is None else (gate, self._modules.up.weight())

    def _shifts(self, beta: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        gate, up = self._modules.gate.shift(beta), None
        if self._modules.fused and gate is not None:
            gate, up = gate.chunk(2, 0)
            return gate, up
        if self._modules.up is not None and not self._modules.fused:
            up = self._modules.up.shift(beta)
        return gate, up


class ExpertsBody:
    """Σ_e g_e(n) E_e(n): the experts' own Jacobians, and that of the router's softmax.

    With y the gated sum and q the router's softmax (over the chosen experts if gates are renormalized):

        A_i = Σ_e g_ie ∂E_e/∂n + Σ_e g_ie E_e W_r[e] − y Σ_e q_ie W_r[e]
    """

    def __init__(self, modules: ExpertsModules, spec: ExpertsSpec, seen: ExpertsSeen) -> None:
        self._modules, self._spec, self._seen = modules, spec, seen

    def sums(self, weights: Tensor, read: Tensor | None, beta: Tensor | None) -> Sums:
        modules, seen = self._modules, self._seen
        entering, gates, flat = upcast(seen.entering), upcast(seen.gates), weights.flatten()
        sequence = torch.arange(len(flat), device=flat.device) // weights.shape[1]
        router, shares, logits = self._router(beta)
        diagonal = flat.new_zeros(len(weights), entering.shape[1])
        moved, mixed, output = (torch.zeros_like(entering) for _ in range(3))
        for expert in seen.chosen.unique().tolist():
            tokens, place = (seen.chosen == expert).nonzero(as_tuple=True)
            gate, up, out = expert_rows(modules, self._spec, entering[tokens], expert)
            share = gates[tokens, place].unsqueeze(-1)
            to_gate, to_up = reference.mlp_slopes(gate, up, self._spec.activation, self._spec.limit)
            assert to_up is not None
            *inputs, down = modules.weights(expert)
            rows = flat[tokens].unsqueeze(-1) * share
            parts = [
                flat.new_zeros(len(weights), slope.shape[1]).index_add(0, sequence[tokens], slope * rows)
                for slope in (to_gate, to_up)
            ]
            diagonal = diagonal + dispatch.mlp_diagonal(inputs, down, parts)[0]
            gated = out * share
            output = output.index_add(0, tokens, gated)
            mixed = mixed.index_add(0, tokens, gated * router[expert])
            if read is not None:
                biases = modules.biases(expert)
                change = to_gate * _unshifted(gate, biases[0]) + to_up * _unshifted(up, biases[1])
                along = change @ upcast(down).mT * share + gated * logits[tokens, expert].unsqueeze(-1)
                moved = moved.index_add(0, tokens, along)
        mixed = (mixed - output * (shares @ router)) * flat.unsqueeze(-1)
        diagonal = diagonal + mixed.view(*weights.shape, -1).sum(1)
        if read is None:
            return _DiagonalSums(lambda scale: (diagonal, None), None)
        moved = moved - output * (shares * logits).sum(-1, keepdim=True)
        moved = moved.view(*weights.shape, -1)
        if read.numel():
            moved = moved.gather(2, read.unsqueeze(1).expand(-1, moved.shape[1], -1))
        return _DiagonalSums(lambda scale: (diagonal, None), moved)

    def adjoint(self, rows: Tensor) -> Tensor:
        raise AssertionError("`recognize` refuses a norm after the experts")

    def _router(self, beta: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """W_r, (E, d), the softmax q, (tokens, E), and the logits without their biases."""
        seen, weight, bias = self._seen, upcast(self._modules.router_weight()), self._modules.router_bias()
        logits = upcast(seen.logits)
        if self._spec.renormalized:
            shares = torch.zeros_like(logits).scatter(1, seen.chosen, seen.gates.to(logits.dtype))
        else:
            shares = torch.softmax(logits, -1)
        return weight, shares, _unshifted(logits, bias)


def _unshifted(rows: Tensor, bias: Tensor | None) -> Tensor:
    return rows if bias is None else rows - upcast(bias)


class AttentionBody:
    """Σ_h W_o o_h."""

    def __init__(self, modules: AttentionModules, spec: AttentionSpec, seen: AttentionSeen) -> None:
        self._modules, self._spec, self._seen = modules, spec, seen
        self._call, self._rotary = observed(modules, spec, seen)
        self._norms = tuple(
            head_norm(spec, norm, entering_heads(spec, entering))
            for norm, entering in ((modules.query_norm, seen.query_entering), (modules.key_norm, seen.key_entering))
        )

    def sums(self, weights: Tensor, read: Tensor | None, beta: Tensor | None) -> Sums:
        call, (query_norm, key_norm) = self._call, self._norms
        last, output = self._modules.output.weight(), self._output()
        move = None if read is None else self._move(beta, last, read, output)
        sums = dispatch.attention_curvature(
            call.query,
            call.key,
            call.value,
            output,
            weights,
            call.attends,
            rotary=self._rotary,
            query_norm=query_norm,
            key_norm=key_norm,
            move=move,
        )
        moved = None
        if read is not None:
            assert sums.moved is not None
            moved = sums.moved.sum(1)
            if read.numel() == 0:
                moved = sums.moved.transpose(1, 2).flatten(2) @ upcast(last).mT
        return _AttentionSums(self, sums, moved)

    def adjoint(self, rows: Tensor) -> Tensor:
        call, shape = self._call, self._spec.shape
        pulled = (rows @ upcast(self._modules.output.weight())).unflatten(-1, (shape.heads, -1)).transpose(1, 2)
        query, key, value = reference.attention_adjoint(
            call.query, call.key, call.value, self._output(), pulled, call.attends
        )
        groups = shape.heads // shape.shared
        key, value = (x.unflatten(1, (shape.shared, groups)).sum(2) for x in (key, value))
        if self._rotary is not None:
            query, key = self._rotary.turn(query, -1.0), self._rotary.turn(key, -1.0)
        query_norm, key_norm = self._norms
        query = query if query_norm is None else query_norm.pull(query)
        key = key if key_norm is None else key_norm.pull(key)
        weights = self.weights()[:3]
        return sum(
            (
                x.transpose(1, 2).flatten(2) @ upcast(w).flatten(0, 1)
                for x, w in zip((query, key, value), weights, strict=True)
            ),
            torch.zeros((), dtype=rows.dtype, device=rows.device),
        )

    def joint_diagonal(self, sums: AttentionSums) -> Tensor | None:
        """The term of norms over all heads together in the diagonal of every sequence, (B, d), to subtract."""
        query, key, *_ = self.weights()
        last, total = upcast(self._modules.output.weight()), None
        for pull, norm, weight in ((sums.query_pull, self._norms[0], query), (sums.key_pull, self._norms[1], key)):
            if pull is None or norm is None:
                continue
            left = pull.transpose(1, 2).flatten(2) @ last.mT
            right = norm.hat()[0].transpose(1, 2).flatten(2) @ upcast(weight).flatten(0, 1)
            part = (left * right).sum(1) / norm.width
            total = part if total is None else total + part
        return total

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_q, (H, width, d), W_k and W_v, (K, width, d), and W_o, (H, d, width), of every head."""
        modules, shape = self._modules, self._spec.shape
        weights = modules.query.weight(), modules.key.weight(), modules.value.weight()
        query, key, value = shape.split(self._spec.layout, weights)
        if self._spec.query_factor != 1:
            # In float32: a factor that is not a power of two would round in half precision.
            query = upcast(query) * self._spec.query_factor
        output = modules.output.weight().unflatten(1, (shape.heads, -1)).transpose(0, 1)
        return query, key, value, output

    def _output(self) -> Tensor:
        return self._seen.output.unflatten(-1, (self._spec.shape.heads, -1)).transpose(1, 2)

    def _move(self, beta: Tensor | None, last: Tensor, read: Tensor, output: Tensor) -> Move:
        """The change of the token's own query, key and value along ñ, which excludes biases."""
        call, heads = self._call, self._spec.shape.heads
        shifts = head_shifts(self._modules, self._spec, beta)
        query, key = (
            _moved(x, shift, norm, self._rotary)
            for x, shift, norm in zip((call.query, call.key), shifts, self._norms, strict=False)
        )
        value = upcast(call.value)
        moved = value if shifts[2] is None else value - upcast(shifts[2]).unsqueeze(-2)
        if read.numel() == 0:
            return Move(query, key, moved, value, upcast(output))
        # (B, H, e, m): the rows of W_o that are read.
        rows = upcast(last[read]).unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)
        values = thin_product(per_query_head(value, heads), rows)
        moved_values = values if shifts[2] is None else thin_product(per_query_head(moved, heads), rows)
        return Move(query, key, moved_values, values, thin_product(upcast(output), rows))


class _AttentionSums:
    def __init__(self, body: AttentionBody, sums: AttentionSums, moved: Tensor | None) -> None:
        self._sums, self.moved = sums, moved
        self._weights = body.weights()
        self._joint = body.joint_diagonal(sums)

    def trace(self, factor: Tensor, scale: Tensor | None) -> Tensor:
        sums, factor = self._sums, factor.expand(self._weights[3].shape[1])
        trace = dispatch.attention_trace(*self._weights, (sums.query, sums.key, sums.value), factor, scale)
        return trace if self._joint is None else trace - self._joint @ factor

    def diagonal(self, slopes: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        sums = self._sums

        def weigh(x: Tensor) -> Tensor:
            return (slopes @ x.flatten(1)).view(x.shape[1:])

        weighted = weigh(sums.query), weigh(sums.key), weigh(sums.value)
        diagonal, image = dispatch.attention_diagonal(*self._weights, weighted, scale)
        return diagonal if self._joint is None else diagonal - slopes @ self._joint, image


def observed(modules: AttentionModules, spec: AttentionSpec, seen: AttentionSeen) -> tuple[Any, Rotary | None]:
    """The arguments of an attention function, captured or computed from the projections, and its rotary embedding.

    Raises:
        RuntimeError: the attention function was replaced after the regularizers were attached.
        InputError: it has an argument in this pass that the closed form does not support.
    """
    rotary = rotary_of(spec.rotary, seen.positions) if getattr(modules.module, "use_rope", True) else None
    if seen.call is not None:
        if seen.call.unusual:
            raise InputError(
                f"{modules.path} attends with {seen.call.unusual} in this pass, which the exact trace does not "
                "support; use estimator='hutchinson', or leave it out"
            )
        return seen.call, rotary
    if seen.projected is None:
        raise RuntimeError(
            f"the attention function of {modules.path} was changed after the regularizers were attached; call "
            "set_attn_implementation before attaching them"
        )
    query, key, value = heads_of(spec, *seen.projected)
    query = query * spec.query_factor
    if rotary is not None:
        query, key = rotary.turn(query).to(value.dtype), rotary.turn(key).to(value.dtype)
    return call_of(spec, query, key, value, seen), rotary


def head_shifts(modules: AttentionModules, spec: AttentionSpec, beta: Tensor | None) -> tuple[Tensor | None, ...]:
    """W β + bias of queries, keys and values, (H or K, width) each, or None for 0."""
    linears = modules.query, modules.key, modules.value
    rows = [linear.shift(beta) for linear in linears]
    given = next((row for row in rows if row is not None), None)
    if given is None:
        return None, None, None
    filled = tuple(
        given.new_zeros(linear.shape[0]) if row is None else row for row, linear in zip(rows, linears, strict=True)
    )
    query, key, value = spec.shape.split(spec.layout, filled)  # type: ignore[arg-type]
    return query * spec.query_factor, key, value


def _moved(heads: Tensor, shift: Tensor | None, norm: HeadNorm | None, rotary: Rotary | None) -> Tensor | None:
    """The change of queries or keys along ñ: R_i J W ñ with J of a norm on heads; None if it equals the heads."""
    if norm is not None:
        entering = upcast(norm.entering)
        pushed = norm.push(entering if shift is None else entering - upcast(shift).unsqueeze(-2))
        return pushed if rotary is None else rotary.turn(pushed)
    if shift is None:
        return None
    constant = upcast(shift).unsqueeze(-2).expand(heads.shape)
    return upcast(heads) - (constant if rotary is None else rotary.turn(constant))


def _rows(last: Tensor, read: Tensor | None) -> Tensor | None:
    """The rows `read` of the last projection, (B, m, f), or all of them, (1, d, f)."""
    if read is None:
        return None
    return last.unsqueeze(0) if read.numel() == 0 else last[read]
