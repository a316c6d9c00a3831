"""Decides by a trial run what a branch computes, and whether the closed form describes it.

Every claim that the closed form makes of a branch is compared with the tensors that went by: that the pre-activations
are images of the branch's input, which activation follows, how heads are laid out, normalized and rotated, what they
attend to, and that the last projection ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ofa import trial
from ofa.anatomy import Anatomy, Branch, Step
from ofa.closed_form.interface import Attending, Watching
from ofa.closed_form.parts import (
    LAYOUTS,
    AttentionParts,
    HeadShape,
    MlpParts,
    NoClosedForm,
    attention_parts,
    mlp_parts,
)
from ofa.closed_form.taps import AttentionSeen, AttentionTap, MlpSeen, MlpTap, Tap
from ofa.module_io import hidden_input
from ofa_kernels import reference
from ofa_kernels.reference import HeadNorm, Rotary

ROTARIES = ("none", "half", "interleaved")


@dataclass(frozen=True)
class MlpFit:
    """What an MLP computes: down(φ(gate) ⊙ up)."""

    activation: str


@dataclass(frozen=True)
class AttentionFit:
    """What an attention computes; `query_factor` multiplies queries ahead of the heads (OPT), `norm_offset` is 1 for
    head norms that store γ − 1, and `norm_eps` is theirs.
    """

    shape: HeadShape
    layout: str
    rotary: str
    query_factor: float
    norm_offset: float = 0.0
    norm_eps: float = 0.0
    norm_tokens_first: bool = False


Fit = MlpFit | AttentionFit
Parts = MlpParts | AttentionParts


@dataclass(frozen=True)
class Fitted:
    """A branch, its modules, and what they compute."""

    branch: Branch
    parts: Parts
    fit: Fit


def fit(model: nn.Module, anatomy: Anatomy, steps: Iterable[Step]) -> tuple[Fitted, ...]:
    """Every branch of the steps with what it computes; one layer of each kind is run on a few tokens.

    Raises:
        NoClosedForm: the first branch that the closed form does not describe, and why.
    """
    branches = [(step.layer, branch) for step in steps for branch in step.branches]
    parts = {branch: _parts(model, branch) for _, branch in branches}
    firsts: dict[Any, tuple[int, Branch]] = {}
    for layer, branch in branches:
        firsts.setdefault(_kind(parts[branch]), (layer, branch))
    fits: dict[Any, Fit] = {}
    taps = [_tap(model, branch, parts[branch], kind, fits) for kind, (_, branch) in firsts.items()]
    watching = Watching(one.module for one in parts.values() if isinstance(one, AttentionParts))
    try:
        trial.run(model, until=anatomy.layers[max(layer for layer, _ in firsts.values())])
    finally:
        watching.remove()
        for handle in (handle for handles in taps for handle in handles):
            handle.remove()
    for kind, (_, branch) in firsts.items():
        if kind not in fits:
            raise NoClosedForm(f"{branch.entry} did not reach its last projection in a trial run")
    return tuple(Fitted(branch, parts[branch], fits[_kind(parts[branch])]) for _, branch in branches)


def why_not(model: nn.Module, anatomy: Anatomy) -> str | None:
    """Why a model's branches have no closed form once its weights are frozen; None where they have one."""
    if not anatomy.sublayer_steps:
        return "the norm stands behind the residual sum"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.requires_grad_(False)
        fit(model, anatomy, anatomy.sublayer_steps)
    except NoClosedForm as reason:
        return str(reason)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return None


def _parts(model: nn.Module, branch: Branch) -> Parts:
    if branch.reads != "normalized":
        raise NoClosedForm(f"the norm stands behind {branch.entry}")
    if branch.role == "mlp":
        return mlp_parts(model, branch)
    if branch.exit != branch.entry:
        raise NoClosedForm(f"a norm stands between {branch.entry} and the stream")
    return attention_parts(model, branch)


def _kind(parts: Parts) -> Any:
    """What distinguishes branches that may compute different things."""
    shapes = tuple(tuple(linear.weight_shape) for linear in parts.linears())
    if isinstance(parts, MlpParts):
        return "mlp", parts.up is None, type(parts.activation), repr(parts.activation), shapes
    # SmolLM3 leaves out the rotary embedding in some layers.
    rotates = bool(getattr(parts.module, "use_rope", True))
    norms = tuple(norm if norm is None else (type(norm), repr(norm)) for norm in (parts.query_norm, parts.key_norm))
    return "attention", type(parts.module), norms, rotates, getattr(parts.module, "scaling", None), shapes


def _tap(model: nn.Module, branch: Branch, parts: Parts, kind: Any, fits: dict[Any, Fit]) -> list[Any]:
    """Hooks that fit the branch when the trial run comes by."""

    def at_end(seen: Any) -> None:
        fits[kind] = _fit_mlp(parts, seen) if isinstance(parts, MlpParts) else _fit_attention(parts, seen)

    tap: Tap
    if isinstance(parts, MlpParts):
        tap = MlpTap(parts, at_end, lambda output: None)
    else:
        tap = AttentionTap(parts, at_end, lambda output: None)

    def open_tap(module: nn.Module, args: Any, kwargs: Any) -> None:
        tap.start(hidden_input(args, kwargs))

    entry = model.get_submodule(branch.entry)
    # First in line: the tap's own hooks on this module must find it open.
    return [entry.register_forward_pre_hook(open_tap, with_kwargs=True, prepend=True), *tap.handles]


def _fit_mlp(parts: MlpParts, seen: MlpSeen) -> MlpFit:
    gate, up = parts.gate.image(seen.entering), None
    if parts.fused:
        gate, up = gate.chunk(2, -1)
    elif parts.up is not None:
        up = parts.up.image(seen.entering)
    for found, image in ((seen.gate, gate), (seen.up, up)):
        if image is not None and (found is None or not trial.close(found, image)):
            raise NoClosedForm(f"{parts.gate.path} does not read the branch's input")
    known = ", ".join(reference.ACTIVATIONS)
    for name in _activations(parts.activation):
        phi = reference.ACTIVATIONS[name](_wide(seen.gate))[0]
        if trial.close(seen.hidden, phi if seen.up is None else phi * _wide(seen.up)):
            return MlpFit(name)
    raise NoClosedForm(f"the activation in front of {parts.down.path} is none of {known}")


def _activations(found: Callable[[Tensor], Tensor] | None) -> list[str]:
    """The names that an activation may have: by its values, since those of a few tokens need not tell two apart.

    All of them where the model does not say what its activation is.
    """
    if found is None:
        return list(reference.ACTIVATIONS)
    grid = torch.linspace(-20, 20, 4001)
    try:
        values = found(grid.clone())
    except (RuntimeError, TypeError, ValueError):
        return []
    # gelu and its tanh form differ by 5e-4; equal formulas in float32 by a few roundings of 20.
    return [name for name, curve in reference.ACTIVATIONS.items() if (curve(grid)[0] - values).abs().max() <= 2e-5]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _fit_attention(parts: AttentionParts, seen: AttentionSeen) -> AttentionFit:
    if seen.attending is not None and seen.attending.unusual:
        raise NoClosedForm(f"{parts.path} attends with {seen.attending.unusual}")
    shape = _head_shape(parts, seen)
    rotates = seen.positions is not None and getattr(parts.module, "use_rope", True)
    scaling = getattr(parts.module, "scaling", 1.0)
    choices = product(
        LAYOUTS[1:] if parts.fused else LAYOUTS[:1],
        ROTARIES[1:] if rotates else ROTARIES[:1],
        dict.fromkeys((1.0, float(scaling))),
        (0.0, 1.0) if parts.query_norm is not None else (0.0,),
    )
    for layout, rotary, factor, offset in choices:
        fit = AttentionFit(shape, layout, rotary, factor, offset, _eps(parts.query_norm))
        if _describes(fit, parts, seen):
            return replace(fit, norm_tokens_first=_tokens_first(fit, parts, seen))
    raise NoClosedForm(f"{parts.path} does more than project, rotate and attend")


def _head_shape(parts: AttentionParts, seen: AttentionSeen) -> HeadShape:
    if seen.attending is not None:
        (_, heads, _, width), (_, shared, *_) = seen.attending.query.shape, seen.attending.key.shape
        return HeadShape(heads, shared, width)
    module: Any = parts.module
    heads = getattr(module, "num_attention_heads", None) or module.num_heads
    width = module.head_dim
    rows = parts.key.weight_shape[0] // width
    return HeadShape(heads, (rows - heads) // 2 if parts.fused else rows, width)


def _describes(fit: AttentionFit, parts: AttentionParts, seen: AttentionSeen) -> bool:
    try:
        query, key, value = _heads(fit, parts, seen)
    except (ValueError, RuntimeError):
        return False
    attending = seen.attending or attending_of(query, key, value, seen)
    heads = attending.query, attending.key, attending.value
    if not all(trial.close(one, other) for one, other in zip(heads, (query, key, value), strict=True)):
        return False
    output = _attend(attending).transpose(1, 2).flatten(2)
    return trial.close(seen.output, output)


def _heads(fit: AttentionFit, parts: AttentionParts, seen: AttentionSeen) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as the fit says they come from the branch's input."""
    q, k, v = _projected(fit, parts, seen)
    if parts.query_norm is not None and parts.key_norm is not None:
        q, k = (
            HeadNorm(x, norm.weight + fit.norm_offset, fit.norm_eps).normalized()  # type: ignore[operator,arg-type]
            for x, norm in ((q, parts.query_norm), (k, parts.key_norm))
        )
    rotary = rotary_of(fit.rotary, seen.positions)
    return (q, k, v) if rotary is None else (rotary.turn(q), rotary.turn(k), v)


def _projected(fit: AttentionFit, parts: AttentionParts, seen: AttentionSeen) -> tuple[Tensor, Tensor, Tensor]:
    """Heads as the projections leave them, (B, H or K, T, width)."""
    images = [linear.image(seen.entering) for linear in (parts.query, parts.key, parts.value)]
    q, k, v = heads_of(fit, *images)
    return q * fit.query_factor, k, v


def heads_of(fit: AttentionFit, *projected: Tensor) -> tuple[Tensor, ...]:
    """Outputs of the projections, (B, T, rows), as heads, (B, H or K, T, width)."""
    rows = tuple(image.movedim(-1, 0) for image in projected)
    return tuple(part.permute(2, 0, 3, 1) for part in fit.shape.split(fit.layout, rows))  # type: ignore[arg-type]


def _tokens_first(fit: AttentionFit, parts: AttentionParts, seen: AttentionSeen) -> bool:
    entering = seen.query_entering
    if entering is None:
        return False
    query = _projected(fit, parts, seen)[0]
    return entering.shape == query.transpose(1, 2).shape and trial.close(entering, query.transpose(1, 2))


def rotary_of(kind: str, positions: tuple[Tensor, Tensor] | None) -> Rotary | None:
    """The rotary embedding of a kind, from cos and sin as models hand them on: the value of every pair twice."""
    if kind == "none" or positions is None:
        return None
    cos, sin = (value if value.dim() == 3 else value.unsqueeze(0) for value in positions)
    if kind == "interleaved":
        return Rotary(cos[..., 0::2], sin[..., 0::2], True)
    half = cos.shape[-1] // 2
    return Rotary(cos[..., :half], sin[..., :half])


def attending_of(query: Tensor, key: Tensor, value: Tensor, seen: AttentionSeen) -> Attending:
    """What an attention that cannot be watched must have seen, from the arguments of its module."""
    mask = seen.rest.get("attention_mask")
    return Attending(query, key, value, mask, query.shape[-1] ** -0.5, mask is None, None)


def _attend(attending: Attending) -> Tensor:
    q, k, v = (x.double() for x in (attending.query, attending.key, attending.value))
    groups = q.shape[1] // k.shape[1]
    scores = attending.scale * q @ k.repeat_interleave(groups, 1).mT
    bias = reference.attention_bias(
        attending.mask, scores.shape[-2], scores.shape[-1], attending.causal, attending.window, scores
    )
    return F.softmax(scores + bias, -1) @ v.repeat_interleave(groups, 1)


def _eps(norm: nn.Module | None) -> float:
    names = ("variance_epsilon", "eps", "epsilon")
    return next((float(getattr(norm, name)) for name in names if hasattr(norm, name)), 0.0)
