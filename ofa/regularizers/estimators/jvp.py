"""Probes without a finite difference: the branch is differentiated along each probe while it runs.

    tr(J P) ≈ 1/N Σᵢ νᵢᵀ J P νᵢ

for random νᵢ with E[ννᵀ] = I (Hutchinson 1990). J P ν is the tangent that forward-mode differentiation carries beside
the branch's own values (dual numbers: Griewank & Walther, Evaluating Derivatives, 2008, ch. 3), so no ε has to be
chosen and nothing is lost to rounding. The tangents stay in the autograd graph: the penalty is trained by reverse mode
through forward mode. The probes are those of `hutchinson` with the same seed, and its limit ε → 0 is this estimate.

A branch that reads the norm's output is given the tangent of the norm: with p = Pν and ẑ = (z − μ)/σ (RMSNorm: z/σ),

    dN = γ ⊙ ( p − mean(p) − ẑ mean(ẑ p) )/σ        (mean(p) for LayerNorm only)

and one that reads the stream is given p itself. Norms behind the branch are treated as `hutchinson` does.

PyTorch's fused attention has no forward mode, and some of its formulas for tangents have no gradient or a wrong one:
between `enter` and `leave` attention, softmax and norms are computed from plain operations, see `_WrittenOut`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ofa.anatomy.steps import Branch, NormView, Step
from ofa.anatomy.trial_run import force_eager
from ofa.errors import InputError
from ofa.regularizers.estimators import BranchMeasurement, Handle, Probe
from ofa.regularizers.estimators.hutchinson import token_mean
from ofa.regularizers.estimators.tangents import preconditioned_probes, through_norm, zeros
from ofa.regularizers.objectives import BranchTrace
from ofa_kernels import dispatch, reference
from ofa_kernels.reference.stream import upcast

ATTENTION = ("sdpa", "eager")
"""The attention implementations of transformers that can be differentiated in forward mode."""

_OTHER = "another estimator, such as estimator='hutchinson'"

_COMPILED = (
    "estimator='jvp' cannot measure a model or a branch inside torch.compile, which drops tangents; leave it out, or "
    f"use {_OTHER}"
)


@dataclass(frozen=True)
class ForwardMode:
    """N probes by forward-mode differentiation; the first rides on the real pass, the others on copies of it."""

    samples: int = 1
    probe: str = "rademacher"
    name: str = "jvp"

    @property
    def copies(self) -> int:
        """Copies of the real input beside it: a dual tensor has one tangent, and the first is the real pass's."""
        return self.samples - 1

    held: ClassVar[bool] = False
    busy: ClassVar[bool] = False
    relies_on: ClassVar[tuple[str, ...]] = ()

    def attach(self) -> tuple[Handle, ...]:
        """Nothing: it is told of everything by `enter` and `leave`."""
        return ()

    def begin(self, branches: Collection[Branch]) -> None:
        """Nothing to prepare: probes are functions of their keys."""

    def enter(self, branch: Branch, norm: NormView, stream: Tensor, entering: Tensor, probe: Probe) -> Tensor:
        """N times the branch's input, each with its own tangent, (N·B) along the first dimension.

        Raises:
            InputError: in `torch.inference_mode()`, or inside of something compiled: PyTorch carries no tangents there.
        """
        if torch.compiler.is_compiling():
            raise InputError(_COMPILED)
        if torch.is_inference_mode_enabled():
            raise InputError(
                f"estimator='jvp' cannot measure in torch.inference_mode(); use torch.no_grad(), or {_OTHER}"
            )
        moves = self._moves(branch, norm, stream, probe)
        tangents = through_norm(moves, norm, stream) if branch.reads == "normalized" else moves
        # Contiguous, since a tangent is laid out as its tensor is: rows that share memory cannot have one each.
        repeated = entering.expand(self.samples, *entering.shape).flatten(0, 1).contiguous()
        _switch_on()
        return forward_ad.make_dual(repeated, tangents.to(entering.dtype).flatten(0, 1))

    def leave(
        self, branch: Branch, norm: NormView, stream: Tensor, leaving: Tensor, probe: Probe, normed: Tensor | None
    ) -> BranchMeasurement:
        """The real output, and νᵀ J P ν of each probe and row of the stream.

        Raises:
            InputError: the branch did not carry the tangent through.
        """
        try:
            dual = forward_ad.unpack_dual(leaving)
        finally:
            # First of all: what follows may launch kernels, which know no tangents.
            self.abandon()
        if dual.tangent is None:
            raise InputError(
                f"{branch.exit} returns nothing that forward-mode differentiation could follow from {branch.entry}; "
                f"use {_OTHER}"
            )
        real = dual.primal.unflatten(0, (self.samples, -1))[0]
        tangents = dual.tangent.unflatten(0, (self.samples, -1))
        if branch.writes == "stream":
            # The tangents still hold Pν, as it was rounded on its way in; F is what the branch adds to the stream.
            moved = self._moves(branch, norm, stream, probe).to(tangents.dtype)
            tangents = upcast(tangents) - upcast(moved)
        keys: dict[str, Any] = {"seed": probe.seed, "step": probe.step, "probe": self.probe}
        products, _ = dispatch.contract(zeros(tangents[0]), tangents, **keys)
        rows = products.sum(0) / self.samples
        return BranchMeasurement(real, None, BranchTrace(token_mean(rows, branch, norm, stream, probe, normed)))

    def abandon(self) -> None:
        """Switch off what a branch needs that was entered and will not be left, because an exception ended it."""
        _running.switches.close()

    def _moves(self, branch: Branch, norm: NormView, stream: Tensor, probe: Probe) -> Tensor:
        return preconditioned_probes(
            norm,
            stream,
            probe,
            samples=self.samples,
            distribution=self.probe,
            norm_reads_stream=branch.norm_reads_stream,
        )


class _Running(threading.local):
    """What is switched on for the branch that a thread is running, to be switched off behind it."""

    def __init__(self) -> None:
        self.switches = ExitStack()


_running = _Running()


def _switch_on() -> None:
    """Switch on what a branch needs. PyTorch has one level of dual numbers: other threads wait until it is off again.

    Raises:
        InputError: they wait in vain; or this is inside of something compiled.
    """
    _running.switches.close()  # of whatever model: an interrupt may have left it open
    with ExitStack() as switches:
        try:
            # What is compiled inside the branch would drop tangents, maybe without a word.
            switches.enter_context(force_eager())
        except RuntimeError as error:
            raise InputError(_COMPILED) from error
        switches.enter_context(forward_ad.dual_level())
        switches.enter_context(_WrittenOut())
        _running.switches = switches.pop_all()


def check_branches(model: nn.Module, steps: Iterable[Step]) -> None:
    """Refuse branches that forward mode cannot go through; PyTorch's own words come late and name no way out.

    Raises:
        InputError: attention is configured for an implementation that is not one of `ATTENTION`, a layer is quantized,
            or a branch is a decoder layer that activation checkpointing runs again: outside its hooks, where it gets
            no tangents.
    """
    for branch in (branch for step in steps for branch in step.branches):
        entry = model.get_submodule(branch.entry)
        if torch.is_grad_enabled() and entry.training and getattr(entry, "gradient_checkpointing", False):
            raise InputError(
                "estimator='jvp' with granularity='layer' cannot be trained under activation checkpointing, whose "
                f"second run of a layer gets no tangents; use granularity='sublayer', or {_OTHER}"
            )
        for module in {entry, model.get_submodule(branch.exit)}:
            _refuse_quantized(branch, module)
        for module in entry.modules():
            used = getattr(getattr(module, "config", None), "_attn_implementation", None)
            if used is not None and used not in ATTENTION:
                raise InputError(
                    f"estimator='jvp' needs attention with forward-mode differentiation, which {used!r} does not have; "
                    f"load the model with attn_implementation='sdpa' or 'eager', or {_OTHER}"
                )


def _refuse_quantized(branch: Branch, module: nn.Module) -> None:
    for path, layer in module.named_modules(prefix=branch.entry):
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and not weight.is_floating_point():
            raise InputError(
                f"estimator='jvp' cannot differentiate through {path}, whose weight is quantized ({weight.dtype}); "
                f"use {_OTHER}"
            )


class _WrittenOut(TorchFunctionMode):
    """Computes from plain operations what PyTorch cannot differentiate in reverse mode through forward mode.

    - Fused attention has no tangents; the unfused path has, but NaN for their gradient in rows that attend to nothing.
    - Softmax's formula overwrites what its own backward pass needs (pytorch/pytorch issue 162350).
    - layer_norm's and rms_norm's take the saved 1/σ for a constant, which gives a wrong gradient and no error (issue
      196700).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _WRITTEN_OUT.get(func, func)(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of (..., H, T, d), in float32 at least; 0 in rows that attend to nothing."""
    q, k, v = upcast(query), upcast(key), upcast(value)
    if enable_gqa:
        k, v = (heads.repeat_interleave(q.shape[-3] // heads.shape[-3], -3) for heads in (k, v))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    attends = (scores > -math.inf).any(-1, keepdim=True)
    weights = _softmax(scores.masked_fill(~attends, 0.0), -1) * attends
    return (F.dropout(weights, dropout_p) @ v).to(query.dtype)


def _softmax(input: Tensor, dim: int, *args: Any, dtype: torch.dtype | None = None, _stacklevel: int = 3) -> Tensor:
    """Softmax a, with the tangent a ⊙ (dx − ⟨a, dx⟩); as a function and as a method `dtype` has other places."""
    dtype = next((given for given in args if isinstance(given, torch.dtype)), dtype)
    primal, tangent = forward_ad.unpack_dual(input if dtype is None else input.to(dtype))
    weights = torch.softmax(primal, dim)
    if tangent is None:
        return weights
    moved = weights * tangent
    return forward_ad.make_dual(weights, moved - weights * moved.sum(dim, keepdim=True))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _norm("layer", input, normalized_shape, weight, bias, eps)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _norm("rms", input, normalized_shape, weight, None, torch.finfo(input.dtype).eps if eps is None else eps)


def _norm(
    kind: str, input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    rows = input.flatten(-len(shape))
    scale = rows.new_ones(rows.shape[-1]) if weight is None else weight.flatten()
    shift = None if bias is None else bias.flatten()
    return reference.norm_step(rows, None, scale, shift, eps=eps, kind=kind)[1].view_as(input)


_WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.softmax: _softmax,
    torch.softmax: _softmax,
    Tensor.softmax: _softmax,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
}
