"""The modules that a branch is made of, by name, and their weights as the mathematics writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ofa import sharding
from ofa.anatomy import Branch
from ofa.errors import InputError
from ofa_kernels.reference.stream import widen

MLP_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "gate_up_proj", "down_proj"),
    ("fc1", None, "fc2"),
    ("c_fc", None, "c_proj"),
    ("fc_in", None, "fc_out"),
    ("dense_h_to_4h", None, "dense_4h_to_h"),
)
"""Gate, up and down projections of an MLP, relative to its module; the same name twice is one fused projection."""

ATTENTION_NAMES = tuple(
    (*projections, output)
    for projections in (
        ("q_proj", "k_proj", "v_proj"),
        ("qkv_proj",) * 3,
        ("c_attn",) * 3,
        ("query_key_value",) * 3,
    )
    for output in ("o_proj", "out_proj", "dense", "c_proj")
)
"""Query, key, value and output projections of an attention, likewise."""

HEAD_NORMS = ("q_norm", "k_norm")

ACTIVATION_NAMES = ("act_fn", "act", "activation_fn", "activation")
"""What modules call the activation that they apply between projections."""

LAYOUTS = ("separate", "stacked", "per head", "grouped")
"""Rows of fused projections: all of q, then k, then v; (q, k, v) of every head in turn; or a group of query heads, the
key head and the value head that they share. Separate projections have a layout of their own."""


class NoClosedForm(Exception):
    """Why a branch has no closed form here; the reason is a clause that can stand behind "because"."""


def version(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor gets another memory or is written to in place."""
    # Tensors of inference mode count nothing.
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class Linear:
    """A linear map x ↦ W x + b whose weight is a plain matrix, stored either way round."""

    path: str
    module: nn.Module
    transposed: bool

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        weight: Any = self.module.weight
        rows, columns = reversed(weight.shape) if self.transposed else weight.shape
        return rows, columns

    def version(self) -> tuple[int, int]:
        """What changes when the weight is replaced or written to in place."""
        return version(self.module.weight)  # type: ignore[arg-type]

    def image(self, rows: Tensor) -> Tensor:
        """W x + b of every row, in float32 or wider."""
        bias = self.bias()
        image = widen(rows) @ self.weight().mT
        return image if bias is None else image + bias

    def stored(self) -> Tensor:
        """W, (outputs, inputs), a view in the dtype that it is stored in."""
        weight: Any = self.module.weight
        weight = sharding.whole(weight).detach()
        return weight.mT if self.transposed else weight

    def weight(self) -> Tensor:
        """W, (outputs, inputs), in float32 or wider; a view where it is stored so."""
        return widen(self.stored())

    def bias(self) -> Tensor | None:
        """b, (outputs), or None."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else widen(sharding.whole(bias).detach())

    def zeros(self) -> Tensor:
        """A bias of zeros, (outputs)."""
        return self.weight().new_zeros(self.weight_shape[0])

    def shift(self, beta: Tensor | None) -> Tensor | None:
        """W β + b, what of its output does not come from n − β; None where that is nothing."""
        bias = self.bias()
        if beta is None:
            return bias
        image = self.weight() @ widen(beta.detach())
        return image if bias is None else image + bias


@dataclass(frozen=True)
class MlpParts:
    """The projections of an MLP; `up` is None for a plain one, and `gate` itself where both are fused.

    `activation` is what stands between them, where the module has it under a known name.
    """

    gate: Linear
    up: Linear | None
    down: Linear
    activation: Callable[[Tensor], Tensor] | None

    @property
    def fused(self) -> bool:
        """Whether one projection makes both halves, the gate's first."""
        return self.up is not None and self.up.module is self.gate.module

    def linears(self) -> Iterator[Linear]:
        """Every projection once."""
        yield from {id(one.module): one for one in (self.gate, self.up, self.down) if one is not None}.values()


@dataclass(frozen=True)
class AttentionParts:
    """The projections of an attention, and the norms of its heads if it has any."""

    module: nn.Module
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    query_norm: nn.Module | None
    key_norm: nn.Module | None

    @property
    def path(self) -> str:
        """Where the attention is in the model."""
        return self.query.path.rpartition(".")[0]

    @property
    def fused(self) -> bool:
        """Whether one projection makes queries, keys and values."""
        return self.query.module is self.key.module

    def linears(self) -> Iterator[Linear]:
        """Every projection once."""
        every = self.query, self.key, self.value, self.output
        yield from {id(one.module): one for one in every}.values()


@dataclass(frozen=True)
class HeadShape:
    """Query heads, key heads that they share, and channels of a head."""

    heads: int
    shared: int
    width: int

    def split(self, layout: str, rows: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the projections as heads: (H or K, width, ...) for queries, keys and values.

        Raises:
            ValueError: the rows cannot be laid out so.
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


def mlp_parts(model: nn.Module, branch: Branch) -> MlpParts:
    """The projections of an MLP branch.

    Raises:
        NoClosedForm: they are not there under any known name, or are no plain matrices.
    """
    entry, end = model.get_submodule(branch.entry), model.get_submodule(branch.exit)
    if entry is not end:
        # The layer calls the projections itself: the branch runs from the first to the last.
        layer = model.get_submodule(branch.entry.rpartition(".")[0])
        return MlpParts(_linear(branch.entry, entry), None, _linear(branch.exit, end), _activation(layer))
    for gate, up, down in MLP_NAMES:
        if all(hasattr(entry, name) for name in (gate, up or gate, down)):
            first, second, last = (
                None if name is None else _linear(f"{branch.entry}.{name}", getattr(entry, name))
                for name in (gate, up, down)
            )
            assert first is not None
            assert last is not None
            return MlpParts(first, second, last, _activation(entry))
    raise NoClosedForm(f"{branch.entry} ({type(entry).__name__}) has no projections that are known by name")


def attention_parts(model: nn.Module, branch: Branch) -> AttentionParts:
    """The projections of an attention branch.

    Raises:
        NoClosedForm: they are not there under any known name, or are no plain matrices.
    """
    module = model.get_submodule(branch.entry)
    for names in ATTENTION_NAMES:
        if all(hasattr(module, name) for name in names):
            query, key, value, output = (_linear(f"{branch.entry}.{name}", getattr(module, name)) for name in names)
            norms = (getattr(module, name, None) for name in HEAD_NORMS)
            return AttentionParts(module, query, key, value, output, *norms)
    raise NoClosedForm(f"{branch.entry} ({type(module).__name__}) has no projections that are known by name")


def check_frozen(linears: Iterable[Linear]) -> None:
    """Refuse projections that are trained, whose gradient would lack what the trace has of them.

    Raises:
        InputError: the first one.
    """
    for linear in linears:
        module = linear.module
        # Asked in every forward pass; going through modules that have none inside is most of what that takes.
        own = module.parameters() if module._modules else module._parameters.values()
        if any(parameter is not None and parameter.requires_grad for parameter in own):
            raise InputError(
                f"{linear.path} is trained since the regularizers were attached, and the closed form takes the weights "
                "as constants; freeze it, or use estimator='hutchinson' or 'jvp'"
            )


def _activation(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    found = (getattr(module, name, None) for name in ACTIVATION_NAMES)
    return next((one for one in found if callable(one)), None)


def _linear(path: str, module: nn.Module) -> Linear:
    weight = getattr(module, "weight", None)
    transposed = sharding.own_class(module).__name__ == "Conv1D"
    if not (isinstance(module, nn.Linear) or transposed) or not isinstance(weight, Tensor):
        raise NoClosedForm(f"{path} is a {type(module).__module__}.{type(module).__name__}, not a plain linear map")
    if weight.dim() != 2 or not weight.is_floating_point() or weight.element_size() == 1:
        raise NoClosedForm(f"the weight of {path} is quantized")
    if any(parameter.requires_grad for parameter in module.parameters()):
        raise NoClosedForm(f"{path} is trained, and the closed form takes the weights as constants")
    return Linear(path, module, transposed)
