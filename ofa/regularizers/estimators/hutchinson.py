"""The paper's estimator: random probes and a finite difference, with all probes in one batch.

    tr(J P) ≈ 1/(εN) Σᵢ νᵢᵀ(F(Z + εPνᵢ) − F(Z))

for random νᵢ with E[ννᵀ] = I (Hutchinson 1990). If the branch reads the norm's output, its input is the norm of the
perturbed stream. If the norm comes after the branch, the σ of P = Γ/σ is not known before; since σ is one number per
token, tr(J Γ/σ) = E[(ν/σ)ᵀ J Γν], and the output rows are divided by σ.

With the curvature held fixed, the derivative in γ is a diagonal, and E[ν ⊙ (J ν/σ)] = diag(J)/σ:

    ∂tr/∂γ_k ≈ 2/(εN) Σᵢ ν_ik (F(Z + εν_i/σ) − F(Z))_k,     tr ≈ ½ Σ_k γ_k ∂tr/∂γ_k

The copies are perturbed without γ, and run after the branch without a graph. Probes along Pν would have to be divided
by γ_k, some of which are near 0: their noise is 1.2 to 79 times the gradient in branches of the embedded model, that of
ν/σ 0.3 to 4.5 times.

Works for any architecture. Error: the probes' variance, and O(ε) curvature against O(1/ε) rounding. Both depend on the
displacement relative to the token's length, and lengths grow a hundredfold from the first layer to the last. So the
default ε is δ times the branch's `EpsilonScale`, the ε that displaces a token by its own length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ofa import sharding
from ofa.anatomy import trial_run as trial
from ofa.anatomy.module_io import Arguments, hidden_input
from ofa.anatomy.steps import Branch, NormView, Step
from ofa.regularizers.estimators import BranchMeasurement, Handle, Probe, TraceEstimator
from ofa.regularizers.estimators.replay import Replay
from ofa.regularizers.objectives import BranchTrace, token_shares
from ofa_kernels import dispatch, reference
from ofa_kernels.reference.stream import upcast

DELTA = {torch.float64: 1e-4, torch.float32: 3e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Displacement of a token by the default step, relative to its length, by the dtype that the branch computes in.

About the square root of the unit roundoff u, where O(δ) curvature equals O(u/δ) rounding (float64 models round to
float32 inside, in norms and softmax). Measured by `python -m benchmarks.precision` on the embedded model: the largest
error of a group of layers, and the median error of gradients, are 4e-4 and 4e-4 in float32, 2.6 % and 1.5 % in float16,
1.9 % and 4.8 % in bfloat16 (5.3 % and 5.0 % under autocast), where the noise of one probe is 5 to 7 %. With a δ three
times larger or smaller, errors are up to six times larger; the best ε for all layers alike has 13 % in bfloat16.
"""

INT8_DELTA = 3e-2
"""The least δ of branches with layers that round their input to 8 bits (LLM.int8).

Measured against forward mode through the dequantized weights: the error is 3 to 6 %; 7 to 14 % for 1e-2 and 3 to 12 %
for 1e-1. For float32's 3e-4, the rounding is as large as the trace.
"""


@dataclass(frozen=True)
class EpsilonScale:
    """The scale of a branch's ε, found before measuring it.

    Attributes:
        epsilon: the ε for which εPν is as long as a token of the stream Z.
        scale: the root mean square of γ, the ratio of the lengths of Pν and ν/σ.
        at_least: the least δ above the rounding of quantized layers; 0 without any.
    """

    epsilon: float
    scale: float = 1.0
    at_least: float = 0.0


@dataclass(eq=False)
class _Differences(TraceEstimator):
    """N probes by finite differences.

    `epsilon` is the same for all branches; None chooses one per branch by the dtype and by `scales`, the branch's
    `EpsilonScale` (1 for branches without one).
    """

    samples: int = 1
    epsilon: float | None = None
    probe: str = "rademacher"
    scales: Mapping[Branch, EpsilonScale] = field(default_factory=dict)

    name = "hutchinson"

    def _keys(self, branch: Branch, stream: Tensor, probe: Probe) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "epsilon": self._epsilon(branch, stream),
            "seed": probe.seed,
            "step": probe.step,
            "probe": self.probe,
        }

    def _epsilon(self, branch: Branch, stream: Tensor) -> float:
        if self.epsilon is not None:
            return self.epsilon
        delta, scale = DELTA[_branch_dtype(stream)], self.scales.get(branch)
        return delta if scale is None else max(delta, scale.at_least) * self._unit(scale)

    def _unit(self, scale: EpsilonScale) -> float:
        """The ε that displaces a token by its own length."""
        return scale.epsilon


@dataclass(eq=False)
class Hutchinson(_Differences):
    """Finite differences with the gradient in P alone: the copies run after the branch, without a graph."""

    def attach(self, model: nn.Module, branches: Sequence[Branch]) -> list[Handle]:
        """Attach the hooks that record the arguments of the branches."""
        self._replays = {branch: Replay(model, branch) for branch in branches}
        return [handle for replay in self._replays.values() for handle in replay.handles]

    def abandon(self) -> None:
        """Release the arguments of branches that were entered and not left."""
        self.busy = False
        for replay in self._replays.values():
            replay.stop()

    def enter(self, branch: Branch, norm: NormView, stream: Tensor, entering: Tensor, probe: Probe) -> Tensor:
        """The branch's input unchanged; recording of its arguments starts."""
        self._replays[branch].start()
        return entering

    def leave(
        self, branch: Branch, norm: NormView, stream: Tensor, leaving: Tensor, probe: Probe, normed: Tensor | None
    ) -> BranchMeasurement:
        """The branch's output unchanged, and the trace of every sequence from the copies' outputs."""
        keys, replay = self._keys(branch, stream, probe), self._replays[branch]
        with torch.no_grad():
            stream = stream.detach()
            if branch.reads == "normalized":
                settings = {"eps": norm.eps, "kind": norm.kind, "offset": norm.offset, **keys}
                inputs = dispatch.perturb(stream, norm.weight, norm.bias, **settings, scaled=False)
            else:
                inputs = dispatch.displace(stream, self._direction(norm, stream, normed), **keys)
            self.busy = True
            try:
                copies = replay.run(inputs.flatten(0, 1), self.samples)
            finally:
                self.busy = False
            replay.stop()
            weights = token_shares(probe.of_pass.mask, stream) / (self.samples * keys["epsilon"])
            if normed is not None:
                weights = weights * reference.rstd(normed.view(stream.shape), eps=norm.eps, kind=norm.kind)
            drawn = {name: keys[name] for name in ("seed", "step", "probe")}
            real, copies = leaving.detach().view(stream.shape), copies.view(inputs.shape)
            diagonal = dispatch.probed_diagonal(real, copies, weights, **drawn)
            if branch.writes == "stream":
                # The outputs contain the streams that they were computed from.
                diagonal = diagonal - dispatch.probed_diagonal(stream, inputs, weights, **drawn)
            trace = diagonal @ norm.scale.to(diagonal.dtype)
        return BranchMeasurement(leaving, None, BranchTrace(trace, lambda slopes: 2 * (slopes @ diagonal)))

    def _direction(self, norm: NormView, stream: Tensor, normed: Tensor | None) -> Tensor:
        """The factor of the probes: 1/σ, or 1 if the branch's norm comes after it."""
        if normed is not None:
            return torch.ones((), dtype=upcast(stream[:0]).dtype, device=stream.device)
        rstd = reference.rstd(stream, eps=norm.eps, kind=norm.kind) if norm.rstd is None else norm.rstd
        return rstd.view(stream.shape[:-1]).unsqueeze(-1)

    def _unit(self, scale: EpsilonScale) -> float:
        # The displacement ν/σ is shorter than Pν by the root mean square of γ.
        return scale.epsilon * scale.scale


@dataclass(eq=False)
class FullHutchinson(_Differences):
    """Finite differences with the gradient through everything: the copies are in the batch of the real pass."""

    held = False

    def __post_init__(self) -> None:
        """All copies are in the batch."""
        self.copies = self.samples

    def enter(self, branch: Branch, norm: NormView, stream: Tensor, entering: Tensor, probe: Probe) -> Tensor:
        """The branch's input with `copies` perturbed inputs after it, (1 + copies)·B along the first dimension."""
        keys = self._keys(branch, stream, probe)
        if branch.reads == "normalized":
            settings = {"eps": norm.eps, "kind": norm.kind, "offset": norm.offset, **keys}
            return dispatch.perturb(stream, norm.weight, norm.bias, **settings, unperturbed=entering).flatten(0, 1)
        copies = dispatch.displace(stream, self._preconditioner(branch, norm, stream), **keys)
        return torch.cat((entering.unsqueeze(0), copies.to(entering.dtype))).flatten(0, 1)

    def leave(
        self, branch: Branch, norm: NormView, stream: Tensor, leaving: Tensor, probe: Probe, normed: Tensor | None
    ) -> BranchMeasurement:
        """The real output, and the mean of νᵀΔ over the probes and tokens of each sequence."""
        outputs = leaving.unflatten(0, (1 + self.copies, -1))
        # Not two slices: the gradient of a split is one copy.
        first, copies = outputs.split((1, self.copies))
        real = first.squeeze(0)
        contract = partial(dispatch.contract, seed=probe.seed, step=probe.step, probe=self.probe)
        products, sqnorm = contract(real, copies)
        if branch.writes == "stream":
            # The copies' outputs contain their perturbed streams; subtract them, that is tr(P).
            moved = dispatch.displace(
                stream, self._preconditioner(branch, norm, stream), **self._keys(branch, stream, probe)
            )
            products = products - contract(stream, moved)[0]
        rows = products.sum(0) / (self.copies * self._epsilon(branch, stream))
        return BranchMeasurement(real, sqnorm, BranchTrace(token_mean(rows, branch, norm, stream, probe, normed)))

    def _preconditioner(self, branch: Branch, norm: NormView, stream: Tensor) -> Tensor:
        if not branch.norm_reads_stream:
            return norm.scale
        return norm.scale * reference.rstd(stream, eps=norm.eps, kind=norm.kind).unsqueeze(-1)


def token_mean(
    rows: Tensor, branch: Branch, norm: NormView, stream: Tensor, probe: Probe, normed: Tensor | None
) -> Tensor:
    """Mean of one value per token over the real tokens, (B,); divided by σ if the norm comes after the branch."""
    if normed is not None:
        rows = rows * reference.rstd(normed, eps=norm.eps, kind=norm.kind).view(rows.shape)
    shares = token_shares(probe.of_pass.mask, stream)
    return (rows.view(shares.shape) * shares).sum(1)


def epsilon_scales(model: nn.Module, steps: Iterable[Step]) -> dict[Branch, EpsilonScale]:
    """The epsilon scale of every branch, from a trial run on a few tokens.

    At attaching and not from the batch: a sequence's trace then does not depend on the other sequences or the rank, no
    pass syncs, and a resumed run finds the same values. A factor of two matters little, see docs/theory.md, "Choosing
    ε".
    """
    found: dict[Branch, EpsilonScale] = {}
    branches = [branch for step in steps for branch in step.branches]

    def watch(branch: Branch) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            weight: Any = model.get_submodule(branch.norm.path).weight
            epsilon = _length(branch, weight, hidden_input(args, kwargs))
            found.setdefault(branch, EpsilonScale(epsilon, _scale(branch, weight), _at_least(model, branch)))

        reader = branch.norm.path if branch.reads == "normalized" else branch.entry
        # Prepended: tuned norms of a bfloat16 model upcast their input, and this reads the stream before.
        return model.get_submodule(reader).register_forward_pre_hook(hook, with_kwargs=True, prepend=True)

    handles = [model.register_forward_pre_hook(_many_tokens, with_kwargs=True)]
    handles += [watch(branch) for branch in branches]
    device = next(model.parameters()).device.type
    try:
        with torch.autocast(device, enabled=False):
            trial.run(model, until=branches[-1].exit)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _many_tokens(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Sixteen tokens spread over the vocabulary: the first ones are special tokens, with much longer embeddings."""
    ids = kwargs.get("input_ids")
    if ids is None:
        return None
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    spread = torch.linspace(0, embeddings.weight.shape[0] - 1, 18, device=ids.device)[1:-1].long()
    return args, {**kwargs, "input_ids": spread.unsqueeze(0)}


def _length(branch: Branch, weight: Tensor, stream: Tensor) -> float:
    """The median length of a token, relative to the length of Pν."""
    norm = branch.norm
    lengths = 1.0 / reference.rstd(stream, eps=norm.eps, kind=norm.kind)
    # The median, since attention sinks are longer by orders of magnitude.
    length = float((lengths.square() if branch.norm_reads_stream else lengths).median()) / _scale(branch, weight)
    return length if length > 0 else 1.0


def _scale(branch: Branch, weight: Tensor) -> float:
    return max(float((sharding.full_tensor(weight).float() + branch.norm.offset).square().mean().sqrt()), 1e-6)


def _at_least(model: nn.Module, branch: Branch) -> float:
    """The least δ for the quantized layers of a branch; 4-bit layers have their own compute dtype."""
    layers = [layer for path in (branch.entry, branch.exit) for layer in model.get_submodule(path).modules()]
    least = [DELTA.get(getattr(layer, "compute_dtype", None), 0.0) for layer in layers]  # type: ignore[arg-type]
    if any(type(layer).__name__ == "Linear8bitLt" for layer in layers):
        least.append(INT8_DELTA)
    return max(least)


def _branch_dtype(stream: Tensor) -> torch.dtype:
    """The dtype a branch computes in: the stream's, or autocast's if that is on."""
    device = stream.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else stream.dtype
