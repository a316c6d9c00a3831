"""The trace in closed form: no probes, no noise, and a gradient in P without a backward pass.

    tr(J_i P_i) = ( tr(A_i G) − ñ_iᵀ A_i ñ_i / d ) / σ_i²,     G = Γ² − c γγᵀ/d,   ñ = n − β

with A_i the own-token Jacobian of the branch in its normalized input n_i, c = 1 for LayerNorm and 0 for RMSNorm. Sums
over the tokens and one read of the weights give the mean over a sequence, and its derivative in γ with the curvature
held fixed. The derivation is in docs/theory.md. Works for the branches that `ofa.regularizers.closed_form` recognizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ofa.anatomy.module_io import hidden_input
from ofa.anatomy.steps import Anatomy, Branch, NormView, view_norm
from ofa.regularizers.closed_form.attention_interface import AttentionCapture
from ofa.regularizers.closed_form.branch_trace import NormAt, body_of, branch_trace
from ofa.regularizers.closed_form.modules import AttentionModules, NoClosedForm, check_frozen
from ofa.regularizers.closed_form.recognize import recognize, tap_of
from ofa.regularizers.closed_form.taps import Tap
from ofa.regularizers.estimators import BranchMeasurement, Handle, Probe, TraceEstimator
from ofa.regularizers.objectives import BranchTrace, token_shares


class Exact(TraceEstimator):
    """The closed form of every branch of a model's steps."""

    name = "exact"

    def __init__(self, model: nn.Module, anatomy: Anatomy, granularity: str, radial: str, *, full: bool) -> None:
        """Recognize every branch.

        Args:
            radial: how training passes compute the radial terms, one of `branch_trace.RADIAL`; other passes compute
                them exactly.
            full: differentiate through everything, in plain PyTorch, instead of in P alone.

        Raises:
            NoClosedForm: a branch has no closed form, and why.
        """
        if granularity != "sublayer":
            raise NoClosedForm("with granularity='layer' a step is more than one branch with one norm")
        self.held = not full
        self._radial = "exact" if full else radial
        self._recognized = {one.branch: one for one in recognize(model, anatomy, anatomy.steps(granularity))}
        self._norms_after = {
            branch: model.get_submodule(one.after.path)
            for branch, one in self._recognized.items()
            if one.after is not None
        }
        self._taps: dict[Branch, Tap] = {}
        self._after: dict[Branch, Tensor] = {}
        """Inputs of the norms after branches, until the branch is left."""
        self.relies_on = [linear.path for one in self._recognized.values() for linear in one.modules.linears()]

    def attach(self, model: nn.Module, branches: Sequence[Branch]) -> list[Handle]:
        """Attach the hooks inside the branches, and redirect the model's attention functions."""
        modules = [one.modules for one in self._recognized.values()]
        handles: list[Handle] = [AttentionCapture(one.module for one in modules if isinstance(one, AttentionModules))]
        self._taps = {branch: tap_of(one.modules) for branch, one in self._recognized.items()}
        for tap in self._taps.values():
            handles += tap.handles
        return handles + [self._watch(branch) for branch in self._norms_after]

    def enter(self, branch: Branch, norm: NormView, stream: Tensor, entering: Tensor, probe: Probe) -> Tensor:
        """The branch's input unchanged; the tap starts to collect.

        Raises:
            InputError: a projection is trained, and its part of the full gradient would be missing.
        """
        if not self.held:
            check_frozen(self._recognized[branch].modules.linears())
        self._taps[branch].start(entering)
        return entering

    def leave(
        self, branch: Branch, norm: NormView, stream: Tensor, leaving: Tensor, probe: Probe, normed: Tensor | None
    ) -> BranchMeasurement:
        """The branch's output unchanged, and the trace of every sequence.

        Raises:
            RuntimeError: the branch skipped its last projection.
        """
        recognized, seen = self._recognized[branch], self._taps[branch].take()
        reads = self._after.pop(branch, None)
        if seen is None:
            raise RuntimeError(
                f"{branch.entry} skipped its last projection, so the model was changed after the regularizers were "
                "attached; close() them, and attach them after that"
            )
        before = NormAt(norm, stream) if recognized.before is not None else None
        after = None
        if recognized.after is not None:
            assert reads is not None
            view = view_norm(self._norms_after[branch], recognized.after)
            after = NormAt(view, reads.view_as(stream))
        radial = self._radial if probe.of_pass.with_grad else "exact"
        with _plain(stream, grad=not self.held):
            body = body_of(recognized, seen)
            trace = branch_trace(body, before, after, token_shares(probe.of_pass.mask, stream), radial)
        return BranchMeasurement(leaving, None, trace if self.held else BranchTrace(trace.values))

    def abandon(self) -> None:
        """Release the tensors of branches that were entered and not left."""
        for tap in self._taps.values():
            tap.stop()
        self._after.clear()

    def _watch(self, branch: Branch) -> Handle:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._taps[branch].started:
                self._after[branch] = hidden_input(args, kwargs)

        # Prepended: tuned norms of a bfloat16 model upcast their input.
        return self._norms_after[branch].register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


@contextmanager
def _plain(stream: Tensor, *, grad: bool) -> Iterator[None]:
    """No graph unless `grad`, and no autocast: sums are float32 or wider."""
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()), torch.autocast(stream.device.type, enabled=False):
        yield
