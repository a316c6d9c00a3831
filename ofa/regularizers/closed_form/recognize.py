"""Decides by a trial run what a branch computes, and whether it has a closed form.

Every assumption is compared with the tensors of the run: pre-activations are images of the branch's input, the
activation, the layout, norms and rotation of heads, what they attend to, and that the last projection ends the branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ofa import sharding
from ofa.anatomy import trial_run as trial
from ofa.anatomy.module_io import hidden_input
from ofa.anatomy.steps import Anatomy, Branch, Norm, Step
from ofa.regularizers.closed_form.attention_interface import AttentionCall, AttentionCapture
from ofa.regularizers.closed_form.modules import (
    LAYOUTS,
    AttentionModules,
    ExpertsModules,
    HeadShape,
    MlpModules,
    NoClosedForm,
    attention_modules,
    ends_in_norm,
    experts_modules,
    mlp_modules,
)
from ofa.regularizers.closed_form.taps import AttentionSeen, AttentionTap, ExpertsSeen, ExpertsTap, MlpSeen, MlpTap, Tap
from ofa_kernels import reference
from ofa_kernels.reference import Attends, HeadNorm, Rotary, per_query_head, score_blocks
from ofa_kernels.reference.stream import upcast

ROTARIES = ("none", "half", "interleaved", "single")
"""Channel pairs are halves of a head or interleaved; models repeat cos and sin for both, except "single" (halves)."""


@dataclass(frozen=True)
class MlpSpec:
    """An MLP, down(φ(gate) ⊙ up)."""

    activation: str


@dataclass(frozen=True)
class ExpertsSpec:
    """A mixture of experts.

    Attributes:
        activation: φ of every expert.
        limit: gpt-oss' clamp of gate and up, or None.
        renormalized: whether the gates of the chosen experts are rescaled to add up to 1.
    """

    activation: str
    limit: float | None
    renormalized: bool


@dataclass(frozen=True)
class AttentionSpec:
    """An attention. `query_factor` multiplies the projected queries (OPT); `norm_offset` is 1 for head norms that store
    γ − 1, and `norm_eps` is their ε.
    """

    shape: HeadShape
    layout: str
    rotary: str
    query_factor: float
    norm_offset: float = 0.0
    norm_eps: float = 0.0
    norm_tokens_first: bool = False
    adds_alibi: bool = False


Spec = MlpSpec | ExpertsSpec | AttentionSpec
Modules = MlpModules | ExpertsModules | AttentionModules


@dataclass(frozen=True)
class Recognized:
    """A branch, its modules, what they compute, and the norms before and after them."""

    branch: Branch
    modules: Modules
    spec: Spec
    before: Norm | None
    after: Norm | None


def recognize(model: nn.Module, anatomy: Anatomy, steps: Iterable[Step]) -> tuple[Recognized, ...]:
    """Every branch of the steps with what it computes, from a trial run of one branch of each kind.

    Raises:
        NoClosedForm: a branch has no closed form, and why; names the first.
    """
    branches = [(step.layer, branch) for step in steps for branch in step.branches]
    modules = {branch: _modules(model, branch) for _, branch in branches}
    norms = {branch: _norms(branch, anatomy, modules[branch]) for _, branch in branches}
    firsts: dict[Any, tuple[int, Branch]] = {}
    for layer, branch in branches:
        firsts.setdefault(_kind(modules[branch]), (layer, branch))
    taps = {kind: _tap(model, branch, modules[branch]) for kind, (_, branch) in firsts.items()}
    capture = AttentionCapture(one.module for one in modules.values() if isinstance(one, AttentionModules))
    try:
        trial.run(model, until=anatomy.layers[max(layer for layer, _ in firsts.values())])
    finally:
        capture.remove()
        for handle in (handle for _, handles in taps.values() for handle in handles):
            handle.remove()
    specs: dict[object, Spec] = {}
    for kind, (_, branch) in firsts.items():
        seen = taps[kind][0].take()
        if seen is None:
            raise NoClosedForm(f"{branch.entry} did not reach its last projection in a trial run")
        specs[kind] = _spec(modules[branch], seen)
    return tuple(
        Recognized(branch, modules[branch], specs[_kind(modules[branch])], *norms[branch]) for _, branch in branches
    )


def why_not(model: nn.Module, anatomy: Anatomy) -> str | None:
    """Why a model's branches have no closed form; None if they have one."""
    if not anatomy.sublayer_steps:
        return "the norm comes after the residual sum"
    try:
        recognize(model, anatomy, anatomy.sublayer_steps)
    except NoClosedForm as reason:
        return str(reason)
    return None


def _modules(model: nn.Module, branch: Branch) -> Modules:
    if branch.writes == "stream":
        raise NoClosedForm(f"the norm of {branch.entry} comes after the residual sum")
    if branch.role != "mlp":
        return attention_modules(model, branch)
    return experts_modules(model, branch) or mlp_modules(model, branch)


def _norms(branch: Branch, anatomy: Anatomy, modules: Modules) -> tuple[Norm | None, Norm | None]:
    before = branch.norm if branch.norm_reads_stream else None
    after = None
    if ends_in_norm(branch):
        after = next(norm for norm in anatomy.norms if norm.path == branch.exit)
        if any(norm is not None and norm.kind != "rms" for norm in (before, after)):
            raise NoClosedForm(f"{after.path} after {branch.entry} is a LayerNorm")
    if isinstance(modules, ExpertsModules) and (after is not None or branch.norm.kind != "rms"):
        raise NoClosedForm(f"the experts of {branch.entry} have other norms than one RMSNorm before them")
    return before, after


def _kind(modules: Modules) -> object:
    """A key; branches with the same key compute the same function."""
    if isinstance(modules, ExpertsModules):
        return "experts", type(modules.experts), tuple(modules.router_weight().shape)
    shapes = tuple(linear.shape for linear in modules.linears())
    if isinstance(modules, MlpModules):
        return "mlp", modules.up is None, type(modules.activation), repr(modules.activation), shapes
    # SmolLM3 has no rotary embedding in some layers.
    module = modules.module
    rotates = bool(getattr(module, "use_rope", True))
    norms = tuple(norm if norm is None else (type(norm), repr(norm)) for norm in (modules.query_norm, modules.key_norm))
    return "attention", type(module), norms, rotates, getattr(module, "scaling", None), shapes


def tap_of(modules: Modules) -> Tap:
    """The tap of a branch, attached to its modules."""
    if isinstance(modules, MlpModules):
        return MlpTap(modules)
    return ExpertsTap(modules) if isinstance(modules, ExpertsModules) else AttentionTap(modules)


def _tap(model: nn.Module, branch: Branch, modules: Modules) -> tuple[Tap, list[RemovableHandle]]:
    """A tap that the branch's entry starts, and all hooks."""
    tap = tap_of(modules)

    def start(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        tap.start(hidden_input(args, kwargs))

    entry = model.get_submodule(branch.entry)
    # Prepended: the tap's own hooks on this module need it started.
    return tap, [entry.register_forward_pre_hook(start, with_kwargs=True, prepend=True), *tap.handles]


def _spec(modules: Modules, seen: Any) -> Spec:
    try:
        if isinstance(modules, MlpModules):
            return _mlp_spec(modules, seen)
        if isinstance(modules, ExpertsModules):
            return _experts_spec(modules, seen)
        return _attention_spec(modules, seen)
    except ImportError as error:
        raise NoClosedForm(f"its quantized weights cannot be dequantized: {error}") from None


def _mlp_spec(modules: MlpModules, seen: MlpSeen) -> MlpSpec:
    gate, up = modules.gate.image(seen.entering), None
    if modules.fused:
        gate, up = gate.chunk(2, -1)
    elif modules.up is not None:
        up = modules.up.image(seen.entering)
    for found, image in ((seen.gate, gate), (seen.up, up)):
        if image is not None and (found is None or not trial.close(found, image)):
            raise NoClosedForm(f"{modules.gate.path} does not read the branch's input")
    known = ", ".join(reference.ACTIVATIONS)
    for name in _activations(modules.activation):
        phi = reference.ACTIVATIONS[name].forward(upcast(seen.gate))
        if trial.close(seen.hidden, phi if seen.up is None else phi * upcast(seen.up)):
            return MlpSpec(name)
    raise NoClosedForm(f"the activation before {modules.down.path} is none of {known}")


def _activations(found: Callable[[Tensor], Tensor] | None) -> list[str]:
    """Names of the known activations that equal this one on a grid, since a few tokens may not distinguish two.

    All names if the module's activation was not found.
    """
    if found is None:
        return list(reference.ACTIVATIONS)
    grid = torch.linspace(-20, 20, 4001)
    try:
        values = found(grid.clone())
    except (RuntimeError, TypeError, ValueError):
        return []
    # gelu and its tanh form differ by 5e-4; equal formulas in float32 by a few roundings of 20.
    return [name for name, curve in reference.ACTIVATIONS.items() if (curve.forward(grid) - values).abs().max() <= 2e-5]


def _experts_spec(modules: ExpertsModules, seen: ExpertsSeen) -> ExpertsSpec:
    limit = getattr(modules.experts, "limit", None)
    names = ["quick_gelu"] if limit is not None else _activations(modules.activation)
    probabilities = torch.softmax(upcast(seen.logits), -1).gather(1, seen.chosen)
    normalized = probabilities / probabilities.sum(-1, keepdim=True)
    if trial.close(seen.gates, normalized):
        renormalized = True
    elif trial.close(seen.gates, probabilities):
        renormalized = False
    else:
        raise NoClosedForm(f"the router of {modules.path} does not weigh experts by a softmax")
    for name in names:
        spec = ExpertsSpec(name, limit, renormalized)
        if trial.close(seen.output, experts_output(modules, spec, seen)):
            return spec
    raise NoClosedForm(f"the experts of {modules.path} do more than project and activate")


def experts_output(modules: ExpertsModules, spec: ExpertsSpec, seen: ExpertsSeen) -> Tensor:
    """The output of a mixture of experts, (tokens, d), in float32 or wider."""
    output = torch.zeros_like(upcast(seen.entering))
    for expert in seen.chosen.unique().tolist():
        tokens, place = (seen.chosen == expert).nonzero(as_tuple=True)
        _, _, own = expert_rows(modules, spec, upcast(seen.entering)[tokens], expert)
        output = output.index_add(0, tokens, own * upcast(seen.gates)[tokens, place].unsqueeze(-1))
    return output


def expert_rows(
    modules: ExpertsModules, spec: ExpertsSpec, entering: Tensor, expert: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and up pre-activations of some tokens in one expert, (n, f) each, and its output, (n, d)."""
    weights, biases = modules.weights(expert), modules.biases(expert)
    gate, up = (_image(entering, weights[k], biases[k]) for k in range(2))
    g, u = (gate, up) if spec.limit is None else (gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit) + 1)
    hidden = reference.ACTIVATIONS[spec.activation].forward(g) * u
    return gate, up, _image(hidden, weights[2], biases[2])


def _image(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    image = rows @ upcast(weight).mT
    return image if bias is None else image + upcast(bias)


def _attention_spec(modules: AttentionModules, seen: AttentionSeen) -> AttentionSpec:
    if seen.call is not None and seen.call.unusual:
        raise NoClosedForm(f"{modules.path} attends with {seen.call.unusual}")
    shape = _head_shape(modules, seen)
    has_alibi = seen.rest.get("alibi") is not None
    rotates = seen.positions is not None and getattr(modules.module, "use_rope", True) and not has_alibi
    scaling = getattr(modules.module, "scaling", 1.0)
    choices = product(
        LAYOUTS[1:] if modules.fused else LAYOUTS[:1],
        ROTARIES[1:] if rotates else ROTARIES[:1],
        dict.fromkeys((1.0, float(scaling))),
        (0.0, 1.0) if modules.query_norm is not None else (0.0,),
        (False, True) if has_alibi else (False,),
    )
    for layout, rotary, factor, offset, alibi in choices:
        spec = AttentionSpec(shape, layout, rotary, factor, offset, _eps(modules.query_norm), adds_alibi=alibi)
        if _describes(spec, modules, seen):
            return replace(spec, norm_tokens_first=_tokens_first(spec, modules, seen))
    raise NoClosedForm(f"{modules.path} does more than project, rotate and attend")


def _head_shape(modules: AttentionModules, seen: AttentionSeen) -> HeadShape:
    if seen.call is not None:
        (_, heads, _, width), (_, shared, *_) = seen.call.query.shape, seen.call.key.shape
        return HeadShape(heads, shared, width)
    module: Any = modules.module
    heads = getattr(module, "num_attention_heads", None) or module.num_heads
    width = module.head_dim
    rows = modules.key.shape[0] // width
    return HeadShape(heads, (rows - heads) // 2 if modules.fused else rows, width)


def _describes(spec: AttentionSpec, modules: AttentionModules, seen: AttentionSeen) -> bool:
    try:
        query, key, value = _heads(spec, modules, seen)
    except (ValueError, RuntimeError):
        return False
    call = seen.call or call_of(spec, query, key, value, seen)
    heads = call.query, call.key, call.value
    if not all(trial.close(one, other) for one, other in zip(heads, (query, key, value), strict=True)):
        return False
    return trial.close(seen.output, _attend(call).transpose(1, 2).flatten(2))


def _heads(spec: AttentionSpec, modules: AttentionModules, seen: AttentionSeen) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values computed from the branch's input by the spec."""
    q, k, v = _projected(spec, modules, seen)
    query_norm, key_norm = (head_norm(spec, norm, x) for norm, x in ((modules.query_norm, q), (modules.key_norm, k)))
    q = q if query_norm is None else query_norm.normalized()
    k = k if key_norm is None else key_norm.normalized()
    rotary = rotary_of(spec.rotary, seen.positions)
    return (q, k, v) if rotary is None else (rotary.turn(q), rotary.turn(k), v)


def head_norm(spec: AttentionSpec, norm: nn.Module | None, heads: Tensor | None) -> HeadNorm | None:
    """The norm on an attention's heads with its input, (B, heads, T, width)."""
    if norm is None or heads is None:
        return None
    weight: Any = norm.weight
    scale = upcast(sharding.full_tensor(weight)) + spec.norm_offset
    return HeadNorm(
        heads, scale if len(scale) == spec.shape.width else scale.view(-1, 1, spec.shape.width), spec.norm_eps
    )


def entering_heads(spec: AttentionSpec, entering: Tensor | None) -> Tensor | None:
    """The input of a norm on heads, (B, heads, T, width), from its module's argument."""
    if entering is None:
        return None
    if entering.dim() == 3:  # one norm over all heads
        entering = entering.unflatten(-1, (-1, spec.shape.width))
        return entering.transpose(1, 2)
    return entering.transpose(1, 2) if spec.norm_tokens_first else entering


def _projected(spec: AttentionSpec, modules: AttentionModules, seen: AttentionSeen) -> tuple[Tensor, Tensor, Tensor]:
    """Heads as the projections return them, (B, H or K, T, width)."""
    images = [linear.image(seen.entering) for linear in (modules.query, modules.key, modules.value)]
    q, k, v = heads_of(spec, *images)
    return q * spec.query_factor, k, v


def heads_of(spec: AttentionSpec, *projected: Tensor) -> tuple[Tensor, ...]:
    """Outputs of the projections, (B, T, rows), as heads, (B, H or K, T, width)."""
    rows = tuple(image.movedim(-1, 0) for image in projected)
    return tuple(part.permute(2, 0, 3, 1) for part in spec.shape.split(spec.layout, rows))  # type: ignore[arg-type]


def _tokens_first(spec: AttentionSpec, modules: AttentionModules, seen: AttentionSeen) -> bool:
    entering = seen.query_entering
    if entering is None or entering.dim() != 4:
        return False
    query = _projected(spec, modules, seen)[0]
    return entering.shape == query.transpose(1, 2).shape and trial.close(entering, query.transpose(1, 2))


def rotary_of(kind: str, positions: tuple[Tensor, Tensor] | None) -> Rotary | None:
    """The rotary embedding of a kind in `ROTARIES`, from the model's cos and sin."""
    if kind == "none" or positions is None:
        return None
    cos, sin = (value if value.dim() == 3 else value.unsqueeze(0) for value in positions)
    if kind == "interleaved":
        return Rotary(cos[..., 0::2], sin[..., 0::2], True)
    half = cos.shape[-1] if kind == "single" else cos.shape[-1] // 2
    return Rotary(cos[..., :half], sin[..., :half])


def call_of(spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, seen: AttentionSeen) -> AttentionCall:
    """The call of an attention without the registry, from the arguments of its module."""
    mask, scale = seen.rest.get("attention_mask"), query.shape[-1] ** -0.5
    causal = mask is None and query.shape[-2] > 1
    if spec.adds_alibi:
        mask = seen.rest["alibi"].view(len(query), -1, 1, query.shape[-2]) * scale + (0 if mask is None else mask)
    return AttentionCall(query, key, value, Attends(scale=scale, causal=causal, mask=mask))


def _attend(call: AttentionCall) -> Tensor:
    """The output of an attention call, (B, H, T, d)."""
    q, k, v = (x.double() for x in (call.query, call.key, call.value))
    blocks = score_blocks(q, k, call.attends)
    outputs = [weights @ per_query_head(v[:, :, keys], q.shape[1]) for _, keys, _, weights, _ in blocks]
    return torch.cat(outputs, 2)


def _eps(norm: nn.Module | None) -> float:
    names = ("variance_epsilon", "eps", "epsilon")
    return next((float(getattr(norm, name)) for name in names if hasattr(norm, name)), 0.0)
