"""The modules of a branch, found by name, and their effective weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ofa import sharding
from ofa.anatomy.module_names import ACTIVATION_NAMES, ATTENTION_NAMES, HEAD_NORMS, MLP_NAMES, ROUTER_NAMES
from ofa.anatomy.steps import Branch
from ofa.errors import InputError
from ofa_kernels.reference.stream import upcast

LAYOUTS = ("separate", "stacked", "per head", "grouped")
"""Order of the rows of q, k and v in separate projections, or in a fused one: all of q, then k, then v ("stacked"); (q,
k, v) of each head ("per head"); a group of query heads with its shared key head and value head ("grouped")."""


class NoClosedForm(Exception):
    """A branch has no closed form; the message is a clause that follows "because"."""


@dataclass(frozen=True)
class Linear:
    """A linear map x ↦ W x + b. W is the effective weight: dequantized, and including PEFT's adapters."""

    path: str
    module: nn.Module
    plain: bool
    """Whether the weight is stored without quantization. A field, since `torch.compile` cannot check class names."""

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        base: Any = _base(self.module)
        if isinstance(base, nn.Linear):
            return base.out_features, base.in_features
        rows, columns = reversed(base.weight.shape)
        return rows, columns

    def weight(self) -> Tensor:
        """W, (outputs, inputs), in its stored dtype; a view unless it is dequantized or has adapters."""
        return _effective_weight(self.module, plain=self.plain)

    def image(self, rows: Tensor) -> Tensor:
        """W x + b of every row, in float32 or wider."""
        bias = self.bias()
        image = upcast(rows) @ upcast(self.weight()).mT
        return image if bias is None else image + bias

    def bias(self) -> Tensor | None:
        """b, (outputs), or None."""
        return _effective_bias(self.module)

    def shift(self, beta: Tensor | None) -> Tensor | None:
        """W β + b, (outputs): the part of the output that does not depend on n − β; None for 0."""
        bias = self.bias()
        if beta is None:
            return bias
        image = upcast(self.weight()) @ upcast(beta.detach())
        return image if bias is None else image + bias


@dataclass(frozen=True)
class MlpModules:
    """The projections of an MLP; `up` is None for a plain one, and equals `gate` if both are fused.

    `activation` is the function between them, if the module has it under a known name.
    """

    gate: Linear
    up: Linear | None
    down: Linear
    activation: Callable[[Tensor], Tensor] | None

    @property
    def fused(self) -> bool:
        """Whether one projection computes both halves, the gate's first."""
        return self.up is not None and self.up.module is self.gate.module

    def linears(self) -> Iterator[Linear]:
        """Every projection once."""
        yield from {id(one.module): one for one in (self.gate, self.up, self.down) if one is not None}.values()


@dataclass(frozen=True)
class AttentionModules:
    """The projections of an attention, and the norms on its heads if it has any."""

    module: nn.Module
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    query_norm: nn.Module | None
    key_norm: nn.Module | None

    @property
    def path(self) -> str:
        """The attention's path in the model."""
        return self.query.path.rpartition(".")[0]

    @property
    def fused(self) -> bool:
        """Whether one projection computes queries, keys and values."""
        return self.query.module is self.key.module

    def linears(self) -> Iterator[Linear]:
        """Every projection once."""
        every = self.query, self.key, self.value, self.output
        yield from {id(one.module): one for one in every}.values()


@dataclass(frozen=True)
class HeadShape:
    """Numbers of query heads, of key heads that they share, and of channels of a head."""

    heads: int
    shared: int
    width: int

    def split(self, layout: str, rows: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the projections as heads: (H or K, width, ...) for queries, keys and values.

        Raises:
            ValueError: the rows do not fit the layout.
        """
        width, shared = self.width, self.shared
        if layout == "separate":
            q, k, v = (part.reshape(-1, width, *part.shape[1:]) for part in rows)
        elif layout == "stacked":
            sizes = [self.heads * width, shared * width, shared * width]
            q, k, v = (part.reshape(-1, width, *part.shape[1:]) for part in rows[0].split(sizes))
        elif layout == "per head":
            q, k, v = rows[0].reshape(self.heads, 3, width, *rows[0].shape[1:]).unbind(1)
        else:
            groups = rows[0].reshape(shared, self.heads // shared + 2, width, *rows[0].shape[1:])
            q, k, v = groups[:, :-2].flatten(0, 1), groups[:, -2], groups[:, -1]
        if (len(q), len(k), len(v)) != (self.heads, shared, shared):
            raise ValueError(f"{len(q)}, {len(k)} and {len(v)} heads instead of {self.heads} and {shared}")
        return q, k, v


def ends_in_norm(branch: Branch) -> bool:
    """Whether a norm comes between the branch's modules and the stream."""
    return branch.exit != branch.entry and "norm" in branch.exit.rpartition(".")[2]


def mlp_modules(model: nn.Module, branch: Branch) -> MlpModules:
    """The projections of an MLP branch.

    Raises:
        NoClosedForm: they have no known names, or are not plain matrices.
    """
    entry = model.get_submodule(branch.entry)
    if branch.exit != branch.entry and not ends_in_norm(branch):
        # The layer calls the projections itself: the branch runs from the first to the last.
        layer = model.get_submodule(branch.entry.rpartition(".")[0])
        return MlpModules(
            _linear(branch.entry, entry),
            None,
            _linear(branch.exit, model.get_submodule(branch.exit)),
            _activation(layer),
        )
    for gate, up, down in MLP_NAMES:
        if all(hasattr(entry, name) for name in (gate, up or gate, down)):
            first, second, last = (
                None if name is None else _linear(f"{branch.entry}.{name}", getattr(entry, name))
                for name in (gate, up, down)
            )
            assert first is not None
            assert last is not None
            return MlpModules(first, second, last, _activation(entry))
    raise NoClosedForm(f"{branch.entry} ({type(entry).__name__}) has no projections that are known by name")


@dataclass(frozen=True)
class ExpertsModules:
    """A mixture of experts: a router, and experts with weights stacked in one parameter each (transformers 5)."""

    path: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module

    @property
    def activation(self) -> Callable[[Tensor], Tensor] | None:
        """The function between the projections, if the module has it under a known name."""
        return _activation(self.experts)

    def linears(self) -> Iterator[Linear]:
        """None: the experts' weights are stacked in parameters."""
        yield from ()

    def router_weight(self) -> Tensor:
        """W_r, (E, d)."""
        return sharding.full_tensor(self.router.weight).detach()  # type: ignore[arg-type]

    def router_bias(self) -> Tensor | None:
        """b_r, (E), or None."""
        bias = getattr(self.router, "bias", None)
        return None if bias is None else sharding.full_tensor(bias).detach()

    def weights(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """(W_g, W_u, W_d) of an expert, (f, d), (f, d) and (d, f)."""
        gate_up, down = (sharding.full_tensor(getattr(self.experts, name)).detach()[expert] for name in _EXPERT_WEIGHTS)
        if getattr(self.experts, "is_transposed", False):
            gate_up, down = gate_up.mT, down.mT
        return *self._halves(gate_up), down

    def biases(self, expert: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Biases of the gate, up and down projections of an expert, (f), (f) and (d), or None."""
        if not hasattr(self.experts, "gate_up_proj_bias"):
            return None, None, None
        gate_up, down = (
            sharding.full_tensor(getattr(self.experts, f"{name}_bias")).detach()[expert] for name in _EXPERT_WEIGHTS
        )
        return *self._halves(gate_up), down

    def _halves(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        if not getattr(self.experts, "is_concatenated", True):
            return gate_up[::2], gate_up[1::2]
        gate, up = gate_up.chunk(2)
        return gate, up


_EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


def experts_modules(model: nn.Module, branch: Branch) -> ExpertsModules | None:
    """Router and experts of a mixture of experts; None for other branches.

    Raises:
        NoClosedForm: weights are not stacked, or there is a shared expert.
    """
    block = model.get_submodule(branch.entry)
    experts = getattr(block, "experts", None)
    router = next((getattr(block, name) for name in ROUTER_NAMES if hasattr(block, name)), None)
    if not isinstance(experts, nn.Module) or not isinstance(router, nn.Module):
        return None
    if any(not isinstance(getattr(experts, name, None), Tensor) for name in _EXPERT_WEIGHTS):
        raise NoClosedForm(f"the experts of {branch.entry} ({type(experts).__name__}) are not stacked in one parameter")
    if any("shared" in name for name, _ in block.named_children()):
        raise NoClosedForm(f"{branch.entry} has a shared expert")
    return ExpertsModules(branch.entry, block, router, experts)


def attention_modules(model: nn.Module, branch: Branch) -> AttentionModules:
    """The projections of an attention branch.

    Raises:
        NoClosedForm: they have no known names, or are not plain matrices.
    """
    module = model.get_submodule(branch.entry)
    for names in ATTENTION_NAMES:
        if all(hasattr(module, name) for name in names):
            query, key, value, output = (_linear(f"{branch.entry}.{name}", getattr(module, name)) for name in names)
            norms = (getattr(module, name, None) for name in HEAD_NORMS)
            return AttentionModules(module, query, key, value, output, *norms)
    raise NoClosedForm(f"{branch.entry} ({type(module).__name__}) has no projections that are known by name")


def check_frozen(linears: Iterable[Linear]) -> None:
    """Refuse trained projections, since the full gradient of the trace treats them as constants.

    Raises:
        InputError: a projection is trained; names the first.
    """
    for linear in linears:
        if any(parameter.requires_grad for parameter in linear.module.parameters()):
            raise InputError(
                f"{linear.path} is trained, but estimator='exact' with gradient='full' treats it as a constant; "
                "use gradient='preconditioner', or estimator='hutchinson'"
            )


def _activation(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    found = (getattr(module, name, None) for name in ACTIVATION_NAMES)
    return next((one for one in found if callable(one)), None)


def _linear(path: str, module: nn.Module) -> Linear:
    base = _base(module)
    known = isinstance(base, nn.Linear) or sharding.own_class(base).__name__ == "Conv1D"
    if not known or not isinstance(getattr(base, "weight", None), Tensor):
        raise NoClosedForm(f"{path} is a {type(base).__module__}.{type(base).__name__}, not a plain linear map")
    if reason := _unknown_adapter(module):
        raise NoClosedForm(f"{path} has {reason}, whose effective weight is not known here")
    plain = _is_plain(base.weight)  # type: ignore[arg-type]
    if not plain and not _can_dequantize(base):
        raise NoClosedForm(f"the weight of {path} is quantized in a way that is not known here")
    return Linear(path, module, plain)


def _is_plain(weight: Tensor) -> bool:
    return weight.dim() == 2 and weight.is_floating_point() and weight.element_size() > 1 and not _is_torchao(weight)


def _is_torchao(weight: Tensor) -> bool:
    return type(weight).__module__.startswith("torchao.")


def _can_dequantize(base: nn.Module) -> bool:
    weight: Any = base.weight
    return hasattr(base, "W_q") or _is_torchao(weight) or type(weight).__name__ in ("Params4bit", "Int8Params")


def _base(module: nn.Module) -> nn.Module:
    """The layer inside a PEFT adapter, or the module itself."""
    return module.base_layer if hasattr(module, "base_layer") else module  # type: ignore[return-value]


def _unknown_adapter(module: Any) -> str | None:
    if not hasattr(module, "base_layer"):
        return None
    if hasattr(module, "ia3_l"):
        return None
    if not hasattr(module, "lora_A"):
        return f"an adapter of {type(module).__name__}"
    if any(getattr(module, "lora_bias", {}).values()):
        return "a LoRA with biases"
    variants = getattr(module, "lora_variant", {})
    return next((type(variants[name]).__name__ for name in module.active_adapters if name in variants), None)


def _dequantized(base: nn.Module) -> Tensor:
    weight = base.weight
    if type(weight).__name__ == "Int8Params":
        # Not by PEFT, which on a CPU replaces the module's weight and drops its scales.
        state = base.state
        rows, scales = (
            getattr(weight, name) if getattr(weight, name) is not None else getattr(state, name)
            for name in ("CB", "SCB")
        )
        return (weight.data if rows is None else rows).float() * (scales.view(-1, 1) / 127)
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(base).detach()


def _effective_weight(module: Any, *, plain: bool) -> Tensor:
    base: Any = _base(module)
    if plain:
        weight = sharding.full_tensor(base.weight).detach()
        weight = weight.mT if sharding.own_class(base).__name__ == "Conv1D" else weight
    else:
        weight = _dequantized(base)
    for name in _acting(module, "lora_A"):
        update = module.lora_B[name].weight.detach() @ module.lora_A[name].weight.detach()
        weight = upcast(weight) + upcast(update) * module.scaling[name]
    # (1, inputs) in a feed-forward layer, else (outputs, 1): both broadcast over W.
    for name in _acting(module, "ia3_l"):
        weight = upcast(weight) * upcast(module.ia3_l[name].detach())
    return weight


def _effective_bias(module: Any) -> Tensor | None:
    bias = getattr(_base(module), "bias", None)
    if bias is None:
        return None
    bias = upcast(sharding.full_tensor(bias).detach())
    for name in _acting(module, "ia3_l"):
        bias = bias if module.is_feedforward else bias * upcast(module.ia3_l[name].detach()).flatten()
    return bias


def _acting(module: Any, kind: str) -> list[str]:
    """The active adapters of a kind that are not merged into the weight."""
    if not hasattr(module, kind) or module.merged or module.disable_adapters:
        return []
    return [name for name in module.active_adapters if name in getattr(module, kind)]
