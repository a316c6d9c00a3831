"""The steps of small models in float64, independent of `ofa`: the oracle of the tests.

A table in this file has the wiring of each family's layers. Hooks record the modules' arguments in a forward pass, and
the steps call these modules again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests import families

EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
"""Mixtures of experts, wired as Llama is."""

SEQUENTIAL = {
    "llama": ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    "gpt2": ("ln_1", "attn", "ln_2", "mlp"),
    "gpt_neox_sequential": ("input_layernorm", "attention", "post_attention_layernorm", "mlp"),
    "falcon_sequential": ("input_layernorm", "self_attention", "post_attention_layernorm", "mlp"),
    "vit": ("layernorm_before", "attention", "layernorm_after", "mlp"),
    "opt": ("self_attn_layer_norm", "self_attn", "final_layer_norm", "fc"),
}
LIKE_LLAMA = ("mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma", "phi3", *EXPERTS)
SEQUENTIAL |= dict.fromkeys(LIKE_LLAMA, SEQUENTIAL["llama"])
PARALLEL = {
    "phi": ("input_layernorm", "self_attn", "input_layernorm"),
    "cohere": ("input_layernorm", "self_attn", "input_layernorm"),
    "gptj": ("ln_1", "attn", "ln_1"),
    "gpt_neox": ("input_layernorm", "attention", "post_attention_layernorm"),
    "falcon": ("input_layernorm", "self_attention", "input_layernorm"),
    "falcon_alibi": ("input_layernorm", "self_attention", "input_layernorm"),
    "falcon_two_norms": ("ln_attn", "self_attention", "ln_mlp"),
}
SANDWICH = ("gemma2", "gemma3")
BRANCH_NORM = ("olmo2",)
POST_NORM = ("bert",)
POST_NORM_LAYER = {"opt_post_norm": "self_attn_layer_norm"}
"""The norm of the first branch, for the family without a module boundary between its sublayers."""

ONE_PLUS_WEIGHT = ("gemma", "gemma2", "gemma3")
RMS = (*SANDWICH, *BRANCH_NORM, "llama", *LIKE_LLAMA)

CASES = [(name, "sublayer") for name in families.BUILDERS if name not in POST_NORM_LAYER]
CASES += [
    (name, "layer")
    for name in (
        "llama",
        "granite",
        "gemma3",
        "olmo2",
        "phi",
        "gpt2",
        "opt_post_norm",
        "falcon_two_norms",
        "bert",
        "vit",
    )
]
"""Every family by sublayers, and a family of each wiring by layers, whose steps are the layers' inputs and outputs."""


class Float64(TorchFunctionMode):
    """Keeps float64 where a model casts to float32 (norms, softmax, rotary angles).

    Finite differences divide by 1e-7: one float32 rounding would be larger than their value.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].double()
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


@cache
def model(name: str) -> nn.Module:
    """The family's model in float64, shared by the tests; do not change it."""
    return families.build(name).double()


def batch(name: str, *, sequences: int = 2, tokens: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of the family, pixels in float64."""
    given = families.inputs(name, sequences=sequences, tokens=tokens, seed=seed)
    return {key: value.double() if value.is_floating_point() else value for key, value in given.items()}


def scales(root: nn.Module) -> dict[str, nn.Parameter]:
    """Every norm scale γ of a model by its path."""
    return {
        path: parameter
        for path, parameter in root.named_parameters()
        if parameter.dim() == 1 and path.endswith("weight") and "norm" in _class_of(root, path)
    }


def _class_of(root: nn.Module, path: str) -> str:
    return type(root.get_submodule(path.rpartition(".")[0])).__name__.lower()


@dataclass(frozen=True)
class OracleStep:
    """One step: F and the stream Z it is taken from; row j of the trace is left_j · J_jj · right_j.

    `right` is P = diag(γ)/σ if the norm reads the stream; if the norm is after the branch, `right` is γ and `left` is
    each row's 1/σ. `scale` is γ, the weight of the module `norm` (plus 1 in some families); `parts` are the parallel
    branches of a step that have different norms.
    """

    function: Callable[[Tensor], Tensor]
    stream: Tensor
    left: Tensor
    right: Tensor
    norm: nn.Module
    scale: Tensor
    parts: tuple[OracleStep, ...] = ()

    def quadratic(self, nu: Tensor, at: Tensor | None = None) -> Tensor:
        """νᵀ J P ν of each sequence, (B,), by one backward pass; `at` is the point of J, by default the stream."""
        point = (self.stream if at is None else at).detach().requires_grad_()
        (product,) = torch.autograd.grad(self.function(point), point, self.left.unsqueeze(-1) * nu)
        return (product * self.right * nu).sum((1, 2))

    def diagonal(self, nu: Tensor) -> Tensor:
        """One probe's estimate of Σ_i (J_ii)_kk/σ_i, (B, d): of ν ⊙ (J ν/σ), by central differences."""
        h = 1e-5
        move = h * nu * self.right / self.scale
        change = self.function(self.stream + move) - self.function(self.stream - move)
        return (self.left.unsqueeze(-1) * nu * change).sum(1).detach() / (2 * h)

    def dense(self, sequence: int) -> Tensor:
        """J P of one sequence, (T, d, T, d), from the dense Jacobian."""

        def own(z: Tensor) -> Tensor:
            whole = torch.cat((self.stream[:sequence], z.unsqueeze(0), self.stream[sequence + 1 :]))
            return self.function(whole)[sequence]

        jacobian = torch.autograd.functional.jacobian(own, self.stream[sequence], vectorize=True)
        return self.left[sequence].view(-1, 1, 1, 1) * jacobian * self.right[sequence]


def steps(name: str, root: nn.Module, given: dict[str, Tensor], granularity: str) -> list[OracleStep]:
    """The steps of a model on a batch, in order. Call this, and the steps' functions, inside `Float64`.

    Raises:
        AssertionError: the steps do not add up to the layers' outputs, so the table of this file is wrong.
    """
    layers = _layers(root)
    calls = _record_calls(root, given)
    found = []
    for layer in layers:
        args, kwargs, output = calls[layer]
        stream = _hidden(args, kwargs).detach()
        if granularity == "layer":
            added = [_whole_layer(name, layer, stream, calls)]
        else:
            added = _sublayers(name, layer, stream, calls)
        found += added
        end = added[-1].stream + added[-1].function(added[-1].stream)
        # A few terms summed in another order: some roundings of float64.
        torch.testing.assert_close(end, output, rtol=1e-10, atol=1e-10)
    return found


def step_norms(found: list[OracleStep], mask: Tensor | None = None) -> Tensor:
    """‖F_t(Z_t)‖ of each sequence, (T, B), over the tokens where `mask` is 1."""
    updates = torch.stack([step.function(step.stream) for step in found]).detach()
    weights = updates.new_ones(updates.shape[1:3]) if mask is None else mask
    return (updates.square().sum(-1) * weights).sum(-1).sqrt()


def _layers(root: nn.Module) -> list[nn.Module]:
    stacks = [module for module in root.modules() if isinstance(module, nn.ModuleList) and len(module) == 3]
    return list(stacks[0])


def _record_calls(root: nn.Module, given: dict[str, Tensor]) -> dict[nn.Module, tuple[Any, Any, Tensor]]:
    """Arguments and output of every module; clones, because Falcon adds to its branches' outputs in place."""
    calls: dict[nn.Module, tuple[Any, Any, Tensor]] = {}

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else None
        calls[module] = (args, kwargs, None if first is None else first.clone())

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in root.modules()]
    with torch.no_grad():
        root(**given, **({} if root.main_input_name == "pixel_values" else {"use_cache": False}))
    for handle in handles:
        handle.remove()
    return calls


def _hidden(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _caller(module: nn.Module, calls: dict[nn.Module, Any]) -> Callable[[Tensor], Tensor]:
    """The module as a function of the hidden states, with its recorded other arguments."""
    args, kwargs, _ = calls[module]

    def call(hidden: Tensor) -> Tensor:
        named = {} if args else {"hidden_states": hidden}
        return _first(module(*([hidden, *args[1:]] if args else []), **{**kwargs, **named}))

    return call


def _first(output: Any) -> Tensor:
    """A module's first output, without attention weights or router logits."""
    return output if isinstance(output, Tensor) else output[0]


def _mlp(layer: nn.Module, module: str) -> Callable[[Tensor], Tensor]:
    if module == "fc":
        return lambda hidden: layer.fc2(layer.activation_fn(layer.fc1(hidden)))
    return lambda hidden: _first(getattr(layer, module)(hidden))


def _gamma(name: str, norm: nn.Module) -> Tensor:
    return (norm.weight + (1.0 if name in ONE_PLUS_WEIGHT else 0.0)).detach()


def _rstd(name: str, norm: nn.Module, hidden: Tensor) -> Tensor:
    eps = next(getattr(norm, key) for key in ("variance_epsilon", "eps") if hasattr(norm, key))
    centred = hidden if name in RMS else hidden - hidden.mean(-1, keepdim=True)
    return (1 / (centred.square().mean(-1) + eps).sqrt()).detach()


def _before(name: str, norm: nn.Module, stream: Tensor, function: Callable[[Tensor], Tensor]) -> OracleStep:
    """A step whose norm reads the stream: P = Γ/σ(Z)."""
    rstd = _rstd(name, norm, stream)
    scale = _gamma(name, norm)
    return OracleStep(function, stream, torch.ones_like(rstd), scale * rstd.unsqueeze(-1), norm, scale)


def _after(
    name: str, norm: nn.Module, stream: Tensor, reads: Tensor, function: Callable[[Tensor], Tensor]
) -> OracleStep:
    """A step whose norm comes after the branch and reads `reads`: P = Γ/σ(reads)."""
    scale = _gamma(name, norm)
    return OracleStep(function, stream, _rstd(name, norm, reads), scale.expand_as(stream), norm, scale)


def _whole_layer(name: str, layer: nn.Module, stream: Tensor, calls: dict[nn.Module, Any]) -> OracleStep:
    call = _caller(layer, calls)

    def function(z: Tensor) -> Tensor:
        return call(z) - z

    if name in POST_NORM_LAYER or name in POST_NORM or name in BRANCH_NORM:
        if name in POST_NORM:
            norm = layer.attention.output.LayerNorm
        else:
            norm = getattr(layer, POST_NORM_LAYER.get(name, "post_attention_layernorm"))
        return _after(name, norm, stream, _hidden(*calls[norm][:2]), function)
    path = SEQUENTIAL[name][0] if name in SEQUENTIAL else PARALLEL.get(name, ("input_layernorm",))[0]
    return _before(name, getattr(layer, path), stream, function)


def _sublayers(name: str, layer: nn.Module, stream: Tensor, calls: dict[nn.Module, Any]) -> list[OracleStep]:
    if name in PARALLEL:
        return [_parallel(name, layer, stream, calls)]
    if name in SEQUENTIAL:
        first_norm, attention, second_norm, mlp = SEQUENTIAL[name]
        factor = layer.residual_multiplier if name == "granite" else 1.0
        attend, feed = _caller(getattr(layer, attention), calls), _mlp(layer, mlp)
        norms = getattr(layer, first_norm), getattr(layer, second_norm)
        first = _before(name, norms[0], stream, lambda z: factor * attend(norms[0](z)))
        return [first, _before(name, norms[1], _next(first), lambda z: factor * feed(norms[1](z)))]
    if name in SANDWICH:
        attend = _caller(layer.self_attn, calls)
        first = _before(
            name,
            layer.input_layernorm,
            stream,
            lambda z: layer.post_attention_layernorm(attend(layer.input_layernorm(z))),
        )
        second = _before(
            name,
            layer.pre_feedforward_layernorm,
            _next(first),
            lambda z: layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(z))),
        )
        return [first, second]
    if name in BRANCH_NORM:
        attend, norms = (
            _caller(layer.self_attn, calls),
            (layer.post_attention_layernorm, layer.post_feedforward_layernorm),
        )
        first = _after(name, norms[0], stream, attend(stream), lambda z: norms[0](attend(z)))
        middle = _next(first)
        return [first, _after(name, norms[1], middle, layer.mlp(middle), lambda z: norms[1](layer.mlp(z)))]
    assert name in POST_NORM
    attend = _caller(layer.attention, calls)
    norms = layer.attention.output.LayerNorm, layer.output.LayerNorm
    first = _after(name, norms[0], stream, _hidden(*calls[norms[0]][:2]), lambda z: attend(z) - z)
    feed = layer.feed_forward_chunk
    return [
        first,
        _after(name, norms[1], _next(first), _hidden(*calls[norms[1]][:2]), lambda z: feed(z) - z),
    ]


def _parallel(name: str, layer: nn.Module, stream: Tensor, calls: dict[nn.Module, Any]) -> OracleStep:
    """Two parallel branches as one step; with two norms, each branch has its own P.

    The trace of the step is tr(J_A P_A) + tr(J_M P_M). With P_M = P_A D for the diagonal D = γ_M/γ_A, that is the
    trace of (J_A + J_M D) P_A, the Jacobian of A(Z) + M(Z₀ + D(Z − Z₀)) at Z₀.
    """
    first_norm, attention, second_norm = PARALLEL[name]
    norms = getattr(layer, first_norm), getattr(layer, second_norm)
    attend = _caller(getattr(layer, attention), calls)
    ratio = _gamma(name, norms[1]) / _gamma(name, norms[0])

    def function(z: Tensor) -> Tensor:
        return attend(norms[0](z)) + layer.mlp(norms[1](stream + ratio * (z - stream)))

    step = _before(name, norms[0], stream, function)
    if norms[0] is norms[1]:
        return step
    parts = (
        _before(name, norms[0], stream, lambda z: attend(norms[0](z))),
        _before(name, norms[1], stream, lambda z: layer.mlp(norms[1](z))),
    )
    return replace(step, parts=parts)


def _next(step: OracleStep) -> Tensor:
    return (step.stream + step.function(step.stream)).detach()
