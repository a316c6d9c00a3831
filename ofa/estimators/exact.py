"""The trace in closed form: no probes, no noise, one more product per branch.

    tr(J_i P_i) = ( tr(A_i G) − ñ_iᵀ A_i ñ_i / d ) / σ_i²,     G = Γ² − c γγᵀ/d,   ñ = n − β

with A_i the own-token Jacobian of the branch seen from its normalized input n_i, c = 1 for LayerNorm and 0 for RMSNorm.
The derivation is in docs/theory.md. Works for the branches that `ofa.closed_form` recognizes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ofa import sharding
from ofa.anatomy import Anatomy, Branch, NormView
from ofa.closed_form import forms
from ofa.closed_form.fit import fit
from ofa.closed_form.interface import Watching, capturing
from ofa.closed_form.parts import AttentionParts, Linear, NoClosedForm, check_frozen, version
from ofa.estimators import Handle, Leaving, Probe
from ofa_kernels import dispatch
from ofa_kernels.reference.stream import widen


@dataclass(frozen=True)
class _Seen:
    """What constants were computed from: versions of weights and scales, and the values of the scales."""

    versions: list[tuple[int, int]]
    values: Tensor

    def equals(self, other: _Seen) -> bool:
        """Whether nothing has changed. Equal versions are no proof, and the device is asked, once for all scales."""
        return self.versions == other.versions and torch.equal(self.values, other.values)


def _joined(scales: list[Tensor]) -> Tensor:
    """All scales in one tensor: one launch where they are alike."""
    first = scales[0]
    if any(scale.dtype != first.dtype or scale.device != first.device for scale in scales):
        scales = [scale.to(first.device, torch.float64) for scale in scales]
    return torch.cat([scale.reshape(-1) for scale in scales])


def _apart(joined: Tensor, scales: list[Tensor]) -> list[Tensor]:
    """What `_joined` made of the scales, in their own formats again."""
    parts = joined.split([scale.numel() for scale in scales])
    return [part.to(scale.device, scale.dtype) for part, scale in zip(parts, scales, strict=True)]


class Exact:
    """The closed form of every branch of a model's steps, attached to the model until its handles go."""

    name = "exact"
    copies = 0

    def __init__(self, model: nn.Module, anatomy: Anatomy, granularity: str) -> None:
        """Recognize every branch.

        Raises:
            NoClosedForm: a branch is none of those that there is a closed form for, and why.
        """
        if granularity != "sublayer":
            raise NoClosedForm("a step of granularity 'layer' is more than one branch behind one norm")
        fitted = fit(model, anatomy, anatomy.steps(granularity))
        self._fitted = fitted
        self._norm_modules = {one.branch: model.get_submodule(one.branch.norm.path) for one in fitted}
        self._forms: dict[Branch, forms.Form] = {}
        self._norms = list(dict.fromkeys(self._norm_modules.values()))
        self._linears: list[Linear] = [linear for one in fitted for linear in one.parts.linears()]
        self.relies_on = [linear.path for linear in self._linears]
        self._seen: _Seen | None = None

    def attach(self) -> list[Handle]:
        """The hooks inside the branches, and the model's attention functions shown to them."""
        watched = (one.parts.module for one in self._fitted if isinstance(one.parts, AttentionParts))
        handles: list[Handle] = [Watching(watched)]
        self._forms = {one.branch: forms.form(one) for one in self._fitted}
        return handles + [handle for form in self._forms.values() for handle in form.tap.handles]

    def begin(self, branches: Collection[Branch]) -> None:
        """A measured pass of these branches begins: their constants are computed where weights or scales have changed.

        Frozen weights are not read for it. One that is exchanged or written to in place is noticed; one that is written
        to through `.data`, which no version counter sees, is not: write to it under `torch.no_grad()`, or attach anew.

        Behind an optimizer's step the versions say that scales have changed, and the device is not waited for. While a
        CUDA graph is captured it cannot be: the constants are computed in the graph, with what the scales are then.

        Raises:
            InputError: a weight of a branch is trained by now.
        """
        check_frozen(self._linears)
        if any(sharding.is_part(norm.weight) for norm in self._norms):  # type: ignore[arg-type]
            # Each rank has another part, and asking all of them costs more than the constants.
            self._forget()
            return
        scales: list[Tensor] = [norm.weight.detach() for norm in self._norms]  # type: ignore[operator]
        # Outside inference mode, as the constants are.
        with torch.inference_mode(False), torch.no_grad():
            values = _joined(scales)
            now = None if capturing(values) else _Seen(self._versions(scales), values)
            # By value as well: an optimizer may write through `.data`, which no version counter sees.
            if now is None or self._seen is None or not now.equals(self._seen):
                self._forget()
            self._seen = now
            own = dict(zip(self._norms, _apart(values, scales), strict=True))
            # Here, not where they are used: a checkpointed layer that is run again must do what it did before.
            for branch in branches:
                kept, scale = self._forms[branch].kept, widen(own[self._norm_modules[branch]])
                if kept.values is None:
                    kept.compute(scale + branch.norm.offset if branch.norm.offset else scale)

    def _versions(self, scales: list[Tensor]) -> list[tuple[int, int]]:
        return [*(linear.version() for linear in self._linears), *map(version, scales)]

    def _forget(self) -> None:
        self._seen = None
        for form in self._forms.values():
            form.kept.forget()

    def enter(self, branch: Branch, norm: NormView, stream: Tensor, entering: Tensor, probe: Probe) -> Tensor:
        """The branch's input as it is; the branch is watched from here on."""
        self._forms[branch].begin(norm, entering)
        return entering

    def leave(self, branch: Branch, norm: NormView, stream: Tensor, leaving: Tensor, probe: Probe) -> Leaving:
        """The branch's output as it is, and the trace of every row."""
        traced = self._forms[branch].end()
        trace = dispatch.norm_trace(
            stream,
            norm.weight,
            traced.image.view_as(stream),
            traced.trace.view(stream.shape[:-1]),
            eps=norm.eps,
            kind=norm.kind,
            offset=norm.offset,
            shift=traced.shift,
        )
        return Leaving(leaving, None, trace.unsqueeze(0), 1.0)

    def abandon(self) -> None:
        """Let go of what a branch that was entered and never left has collected."""
        for form in self._forms.values():
            form.abandon()
