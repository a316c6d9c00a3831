"""One measured branch at work: constants, the fused operation at its last projection, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ofa.anatomy import NormView
from ofa.closed_form.constants import AttentionProducts, Constants, Kept, MlpProducts
from ofa.closed_form.fit import AttentionFit, Fitted, MlpFit, attending_of, heads_of, rotary_of
from ofa.closed_form.interface import Attending
from ofa.closed_form.parts import AttentionParts, Linear, MlpParts
from ofa.closed_form.taps import AttentionSeen, AttentionTap, MlpSeen, MlpTap, Tap
from ofa_kernels import dispatch
from ofa_kernels.reference import HeadNorm, Rotary


@dataclass(frozen=True)
class Traced:
    """What a branch has to say of its trace, see `ofa_kernels.reference.norm_trace`.

    `image` is A ñ + `shift`, (B, T, d) or (B·T, d); `trace` is tr(A G) of its rows.
    """

    image: Tensor
    trace: Tensor
    shift: Tensor | None


class Form(Protocol):
    """A branch whose trace has a closed form."""

    tap: Tap
    kept: Kept

    def begin(self, norm: NormView, entering: Tensor) -> None:
        """The branch is entered, and its trace is wanted."""
        ...

    def end(self) -> Traced:
        """The branch is left.

        Raises:
            RuntimeError: it did not go through its last projection.
        """
        ...

    def abandon(self) -> None:
        """The branch will not be left; let go of everything."""
        ...


class _Form:
    """What both kinds of branches share: rows put behind the real ones at the last projection, and taken out again."""

    tap: Tap
    kept: Kept

    def __init__(self, last: Linear) -> None:
        self._last = last
        self._constants: Constants = ()
        self._beta: Tensor | None = None
        self._trace: Tensor | None = None
        self._image: Tensor | None = None

    def begin(self, norm: NormView, entering: Tensor) -> None:
        self._constants, self._beta = self.kept.at(norm), norm.bias
        self.tap.start(entering)

    def end(self) -> Traced:
        image, trace = self._image, self._trace
        self.abandon()
        if image is None or trace is None:
            raise RuntimeError(f"the branch did not go through {self._last.path}; was the model changed?")
        return Traced(image, trace, self._last.bias())

    def abandon(self) -> None:
        self.tap.stop()
        self._constants, self._beta, self._trace, self._image = (), None, None, None

    def _take_out(self, output: Tensor) -> Tensor:
        # Not a slice: the gradient of two slices is two zero-filled tensors and their sum.
        real, self._image = output.unflatten(0, (2, -1)).unbind()
        return real


class MlpForm(_Form):
    """An MLP: W_d takes the activations and their tangents in one product."""

    def __init__(self, parts: MlpParts, fit: MlpFit, *, centred: bool) -> None:
        super().__init__(parts.down)
        self._parts, self._fit = parts, fit
        self.kept = Kept(MlpProducts(self._weights), centred)
        self.tap = MlpTap(parts, self._put_behind, self._take_out)

    def _put_behind(self, seen: MlpSeen) -> Tensor:
        up_trace = None if seen.up is None else self._constants[1]
        shifts = self._shifts()
        stack, self._trace = dispatch.mlp_trace(
            seen.gate, seen.up, self._constants[0], up_trace, *shifts, seen.hidden, activation=self._fit.activation
        )
        return stack.flatten(0, 1)

    def _weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        gate, up = self._parts.gate.stored(), None if self._parts.up is None else self._parts.up.stored()
        if self._parts.fused:
            gate, up = gate.chunk(2, 0)
        return gate, up, self._parts.down.stored()

    def _shifts(self) -> tuple[Tensor | None, Tensor | None]:
        gate, up = self._parts.gate.shift(self._beta), None
        if self._parts.fused and gate is not None:
            gate, up = gate.chunk(2, 0)
            return gate, up
        if self._parts.up is not None and not self._parts.fused:
            up = self._parts.up.shift(self._beta)
        return gate, up


class AttentionForm(_Form):
    """An attention: W_o takes the heads' outputs and their tangents in one product."""

    def __init__(self, parts: AttentionParts, fit: AttentionFit, *, centred: bool) -> None:
        super().__init__(parts.output)
        self._parts, self._fit = parts, fit
        self.kept = Kept(AttentionProducts(self._weights), centred)
        self.tap = AttentionTap(parts, self._put_behind, self._take_out)

    def _put_behind(self, seen: AttentionSeen) -> Tensor:
        shape = self._fit.shape
        attending, rotary = attended(self._parts, self._fit, seen)
        output = seen.output.unflatten(-1, (shape.heads, shape.width)).transpose(1, 2)
        query_shift, key_shift, value_shift = head_shifts(self._parts, self._fit, self._beta)
        tangent, self._trace = dispatch.attention_trace(
            attending.query,
            attending.key,
            attending.value,
            output,
            *self._constants,
            scale=attending.scale,
            causal=attending.causal,
            window=attending.window,
            mask=attending.mask,
            rotary=rotary,
            query_shift=query_shift,
            key_shift=key_shift,
            value_shift=value_shift,
            query_norm=head_norm(self._fit, self._parts.query_norm, seen.query_entering),
            key_norm=head_norm(self._fit, self._parts.key_norm, seen.key_entering),
        )
        return torch.cat((seen.output, tangent.transpose(1, 2).flatten(2)))

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts, shape = self._parts, self._fit.shape
        stored = parts.query.stored(), parts.key.stored(), parts.value.stored()
        query, key, value = shape.split(self._fit.layout, stored)
        if self._fit.query_factor != 1:
            # In float32: a factor that is no power of two has no place in half precision.
            query = query.to(torch.promote_types(query.dtype, torch.float32)) * self._fit.query_factor
        output = parts.output.stored().unflatten(1, (shape.heads, shape.width)).transpose(0, 1)
        return query, key, value, output


def attended(parts: AttentionParts, fit: AttentionFit, seen: AttentionSeen) -> tuple[Attending, Rotary | None]:
    """What an attention saw, and the rotary embedding in it; made of the projections where it cannot be watched.

    Raises:
        RuntimeError: it could be watched when the regularizers were attached, and was not called.
    """
    rotary = rotary_of(fit.rotary, seen.positions) if getattr(parts.module, "use_rope", True) else None
    if seen.attending is not None:
        return seen.attending, rotary
    if seen.projected is None:
        raise RuntimeError(
            f"the attention function of {parts.path} was changed after the regularizers were attached; call "
            "set_attn_implementation before"
        )
    query, key, value = heads_of(fit, *seen.projected)
    if rotary is not None:
        query, key = rotary.turn(query).to(value.dtype), rotary.turn(key).to(value.dtype)
    return attending_of(query, key, value, seen), rotary


def head_norm(fit: AttentionFit, norm: nn.Module | None, entering: Tensor | None) -> HeadNorm | None:
    """The norm of an attention's heads and what it read, (B, heads, T, width)."""
    if norm is None or entering is None:
        return None
    weight: Any = norm.weight
    scale = weight.to(torch.promote_types(weight.dtype, torch.float32)) + fit.norm_offset
    return HeadNorm(entering.transpose(1, 2) if fit.norm_tokens_first else entering, scale, fit.norm_eps)


def head_shifts(parts: AttentionParts, fit: AttentionFit, beta: Tensor | None) -> tuple[Tensor | None, ...]:
    """W β + bias of queries, keys and values, (H or K, width) each, or None where that is nothing."""
    linears = parts.query, parts.key, parts.value
    rows = [linear.shift(beta) for linear in linears]
    if all(row is None for row in rows):
        return None, None, None
    zeros = (linear.zeros() for linear in linears)
    given = tuple(zero if row is None else row for row, zero in zip(rows, zeros, strict=True))
    query, key, value = fit.shape.split(fit.layout, given)  # type: ignore[arg-type]
    return query * fit.query_factor, key, value


def form(fitted: Fitted) -> Form:
    """The form of a fitted branch, with its hooks attached."""
    centred = fitted.branch.norm.kind == "layer"
    if isinstance(fitted.parts, MlpParts) and isinstance(fitted.fit, MlpFit):
        return MlpForm(fitted.parts, fitted.fit, centred=centred)
    assert isinstance(fitted.parts, AttentionParts)
    assert isinstance(fitted.fit, AttentionFit)
    return AttentionForm(fitted.parts, fitted.fit, centred=centred)
