"""Forward-mode probes that stay with their token: keys and values move only for their own query.

    tr(J P) ≈ 1/N Σᵢ Σ_t ν_tᵀ A_t dN_t        with E[ννᵀ] = I (Hutchinson 1990)

A_t is the own-token Jacobian of the branch and dN_t = ∂n_t/∂z_t P_t ν_t. The trace is that of all of J P, and the noise
of other tokens' probes, which comes in through attention, is gone: of the variance 2 Σ_ij‖S_ij‖²_F only own blocks are
left (docs/theory.md, "Forward mode"). The tangents of the branch's input travel behind it in the batch; linear maps
take them through, and the activation or the attention is differentiated by hand on the way, as for the closed form, so
that this works for the same branches.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ofa.anatomy import Anatomy, Branch, NormView
from ofa.closed_form.fit import AttentionFit, Fitted, MlpFit, fit
from ofa.closed_form.forms import attended, head_norm, head_shifts
from ofa.closed_form.interface import Watching
from ofa.closed_form.parts import AttentionParts, MlpParts, NoClosedForm, check_frozen
from ofa.closed_form.taps import AttentionSeen, AttentionTap, MlpSeen, MlpTap, Tap
from ofa.estimators import Handle, Leaving, Probe
from ofa.estimators.tangents import preconditioned_probes, through_norm, zeros
from ofa_kernels import dispatch, reference
from ofa_kernels.reference import ACTIVATIONS, HeadNorm, Rotary
from ofa_kernels.reference.attention_trace import tangent


class LocalForwardMode:
    """N local probes; made for a model, whose branches must be those that the closed form knows."""

    name = "local_jvp"

    def __init__(self, model: nn.Module, anatomy: Anatomy, granularity: str, samples: int, probe: str) -> None:
        """Recognize every branch.

        Raises:
            NoClosedForm: a branch is none of those whose inside is known, and why.
        """
        if granularity != "sublayer":
            raise NoClosedForm("a step of granularity 'layer' is more than one branch behind one norm")
        self.copies, self.probe = samples, probe
        self._fitted = fit(model, anatomy, anatomy.steps(granularity))
        self.relies_on = [linear.path for one in self._fitted for linear in one.parts.linears()]
        self._taps: dict[Branch, Tap] = {}

    def attach(self) -> list[Handle]:
        """The hooks inside the branches, and the model's attention functions shown to them."""
        watched = (one.parts.module for one in self._fitted if isinstance(one.parts, AttentionParts))
        handles: list[Handle] = [Watching(watched)]
        self._taps = {one.branch: _tap(one, 1 + self.copies) for one in self._fitted}
        return handles + [handle for tap in self._taps.values() for handle in tap.handles]

    def begin(self, branches: Collection[Branch]) -> None:
        """Nothing to prepare: probes are functions of their keys.

        Raises:
            InputError: a weight of a branch is trained by now; biases are taken as constants.
        """
        check_frozen(linear for one in self._fitted for linear in one.parts.linears())

    def abandon(self) -> None:
        """Let go of what a branch that was entered and never left has collected."""
        for tap in self._taps.values():
            tap.stop()

    def enter(self, branch: Branch, norm: NormView, stream: Tensor, entering: Tensor, probe: Probe) -> Tensor:
        """The branch's input with the norm's tangents along the probes behind it, (1 + N)·B rows."""
        moves = preconditioned_probes(norm, stream, probe, samples=self.copies, distribution=self.probe)
        tangents = through_norm(moves, norm, stream).to(entering.dtype)
        fed = torch.cat((entering.unsqueeze(0), tangents)).flatten(0, 1)
        self._taps[branch].start(fed)
        return fed

    def leave(self, branch: Branch, norm: NormView, stream: Tensor, leaving: Tensor, probe: Probe) -> Leaving:
        """The real output, and ν_tᵀ A_t dN_t of each probe and row of the stream."""
        rows = leaving.unflatten(0, (1 + self.copies, -1))
        real, tangents = rows[0], rows[1:]
        last = next(one.parts for one in self._fitted if one.branch == branch)
        shift = (last.down if isinstance(last, MlpParts) else last.output).bias()
        if shift is not None:
            tangents = tangents - shift.to(tangents.dtype)
        keys: dict[str, Any] = {"seed": probe.seed, "step": probe.step, "probe": self.probe}
        products, _ = dispatch.contract(zeros(real), tangents, **keys)
        return Leaving(real, None, products, 1.0 / self.copies)


def _tap(fitted: Fitted, stacked: int) -> Tap:
    parts, found = fitted.parts, fitted.fit
    if isinstance(parts, MlpParts) and isinstance(found, MlpFit):
        return MlpTap(parts, lambda seen: _mlp(parts, found, seen, stacked), lambda output: None)
    assert isinstance(parts, AttentionParts)
    assert isinstance(found, AttentionFit)
    return AttentionTap(parts, lambda seen: _attention(parts, found, seen, stacked), lambda output: None)


def _mlp(parts: MlpParts, found: MlpFit, seen: MlpSeen, stacked: int) -> Tensor:
    """φ(g) ⊙ u of the real rows, and behind them φ'(g) ⊙ u ⊙ ġ + φ(g) ⊙ u̇ of the tangents."""
    biases: tuple[Tensor | None, Tensor | None] = parts.gate.bias(), None
    if parts.fused and biases[0] is not None:
        biases = tuple(biases[0].chunk(2))  # type: ignore[assignment]
    elif parts.up is not None and not parts.fused:
        biases = biases[0], parts.up.bias()
    gate, gate_moved = _apart(seen.gate, biases[0], stacked)
    phi, slope = ACTIVATIONS[found.activation](gate)
    changed = slope * gate_moved
    if seen.up is not None:
        up, up_moved = _apart(seen.up, biases[1], stacked)
        changed = changed * up + phi * up_moved
    return _behind(seen.hidden, changed, stacked)


def _attention(parts: AttentionParts, found: AttentionFit, seen: AttentionSeen, stacked: int) -> Tensor:
    """O of the real rows, and behind them how each moves when its query and its own key and value do."""
    attending, rotary = attended(parts, found, seen)
    (query, *queries), (key, *keys), (value, *values) = (
        x.unflatten(0, (stacked, -1)).unbind() for x in (attending.query, attending.key, attending.value)
    )
    count, shape = len(query), found.shape
    rotary = None if rotary is None else rotary.first(count)
    output = seen.output[:count].unflatten(-1, (shape.heads, shape.width)).transpose(1, 2)
    mask = attending.mask
    biases = head_shifts(parts, found, None)
    query_norms = _norms(found, parts.query_norm, seen.query_entering, stacked)
    key_norms = _norms(found, parts.key_norm, seen.key_entering, stacked)
    moved = [
        reference.attention_tangent(
            query,
            key,
            value,
            output,
            _moved(queries[i], biases[0], query_norms, i, rotary),
            _moved(keys[i], biases[1], key_norms, i, rotary),
            values[i] if biases[2] is None else values[i] - biases[2].unsqueeze(-2),
            scale=attending.scale,
            causal=attending.causal,
            window=attending.window,
            mask=mask if mask is None or mask.shape[0] == 1 else mask[:count],
            moments=dispatch.attention_moments,
        )
        for i in range(stacked - 1)
    ]
    return _behind(seen.output, torch.stack([one.transpose(1, 2).flatten(2) for one in moved]), stacked)


def _norms(fit: AttentionFit, norm: nn.Module | None, entering: Tensor | None, stacked: int) -> list[HeadNorm]:
    """The heads' norm with the real rows, and with each probe's tangents in their place; none without a norm."""
    whole = head_norm(fit, norm, entering)
    if whole is None:
        return []
    return [replace(whole, entering=part) for part in whole.entering.unflatten(0, (stacked, -1)).unbind()]


def _moved(heads: Tensor, bias: Tensor | None, norms: list[HeadNorm], sample: int, rotary: Rotary | None) -> Tensor:
    """Tangents of queries or keys: images of the tangents in front of them, less the bias, through the heads' norm."""
    if not norms:
        return tangent(heads, bias, None, rotary)
    entering = norms[1 + sample].entering
    pushed = norms[0].push(entering if bias is None else entering - bias.unsqueeze(-2))
    return pushed if rotary is None else rotary.turn(pushed)


def _apart(rows: Tensor, bias: Tensor | None, stacked: int) -> tuple[Tensor, Tensor]:
    """Pre-activations of the real rows, and of the tangents without the bias, (N, ...), in float32."""
    parts = rows.to(torch.promote_types(rows.dtype, torch.float32)).unflatten(0, (stacked, -1))
    return parts[0], parts[1:] if bias is None else parts[1:] - bias


def _behind(real: Tensor, moved: Tensor, stacked: int) -> Tensor:
    """The real rows of a stack with tangents, (N, ...), in place of the others."""
    own = real.unflatten(0, (stacked, -1))[:1]
    return torch.cat((own, moved.to(real.dtype).view(stacked - 1, *own.shape[1:]))).flatten(0, 1)
