"""Finds the steps of a model: which norm preconditions which branch, and how the branch meets the residual stream.

`families.py` proposes a wiring, and a trial run of one decoder layer on a few tokens confirms it: the norm read the
stream, its output entered the branch, the branch's output was added to the stream. A model with renamed or rewired
modules is refused instead of silently mismeasured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ofa import sharding
from ofa.anatomy import trial_run as trial
from ofa.anatomy.families import BranchRow, Family, Wiring, candidates
from ofa.anatomy.module_io import hidden_input, hidden_output
from ofa.errors import InputError
from ofa_kernels import reference
from ofa_kernels.reference.stream import upcast

GRANULARITIES = ("sublayer", "layer")


@dataclass(frozen=True)
class Norm:
    """A norm with a scale: its path, and the formula it computes (`kind`, `offset`, `eps`), confirmed by calling it."""

    path: str
    kind: str
    offset: float
    eps: float
    width: int


@dataclass(frozen=True)
class NormView:
    """A norm as the kernels take it: current scale and shift, (d,) each, and the formula.

    `rstd` is 1/σ of each row that the norm reads, if it is known already.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    kind: str
    offset: float
    rstd: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        """γ, (d,), float32 or wider: what the norm multiplies by."""
        # Always a new tensor: FSDP2 frees the gathered parameter before the backward pass has used it.
        return upcast(self.weight) + self.offset


def view_norm(module: nn.Module, norm: Norm) -> NormView:
    """The norm's current scale and shift, with its formula.

    Raises:
        InputError: they are sharded while their branch computes.
    """
    if sharding.is_dtensor(module.weight):  # type: ignore[arg-type]
        raise InputError(
            f"{norm.path} is sharded while its branch computes, because fully_shard was applied to the norm itself; "
            "apply it to whole layers"
        )
    bias = getattr(module, "bias", None)
    return NormView(module.weight, bias if isinstance(bias, Tensor) else None, norm.eps, norm.kind, norm.offset)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Branch:
    """One branch of a step, with full module paths; `anatomy.families.BranchRow` describes the fields.

    `norm_reads_stream` is False where the norm comes after the branch: its σ is known only then.
    """

    role: str
    norm: Norm
    entry: str
    exit: str
    reads: str
    writes: str
    norm_reads_stream: bool
    residual_reader: str | None = None


@dataclass(frozen=True)
class Step:
    """Z_{t+1} = Z_t + scale · Σ branches: one step of the preconditioned descent."""

    layer: int
    branches: tuple[Branch, ...]
    scale: float = 1.0
    adds_in_place: bool = False


@dataclass(frozen=True)
class Anatomy:
    """What the regularizers and adapters need to know of a model."""

    model_type: str
    wiring: str
    layers: tuple[str, ...]
    norms: tuple[Norm, ...]
    sublayer_steps: tuple[Step, ...]
    layer_steps: tuple[Step, ...]

    def steps(self, granularity: str = "sublayer") -> tuple[Step, ...]:
        """The steps at a granularity: "sublayer" (a step is one branch) or "layer" (a step is one decoder layer).

        Raises:
            InputError: unknown granularity, or one that this wiring has no module boundary for.
        """
        if granularity not in GRANULARITIES:
            raise InputError(f"granularity must be one of {', '.join(GRANULARITIES)}, not {granularity!r}")
        if granularity == "layer":
            return self.layer_steps
        if not self.sublayer_steps:
            raise InputError(
                f"{self.model_type} with the norm after the residual sum has no module boundary between its "
                "sublayers; use granularity='layer'"
            )
        return self.sublayer_steps

    @property
    def tuned_parameters(self) -> int:
        """Number of norm scales, summed over the norms."""
        return sum(norm.width for norm in self.norms)


def find(model: nn.Module) -> Anatomy:
    """The anatomy of a Hugging Face model, confirmed by running one layer on a few tokens.

    Args:
        model: any model whose decoder (or encoder) layers are in a `ModuleList`.

    Raises:
        InputError: no family fits, a step's norm has no weight, or the norm computes something else.
    """
    decoder_path, decoder = _decoder(model)
    model_type = getattr(getattr(decoder, "config", None), "model_type", type(decoder).__name__)
    layers = _layer_paths(decoder, decoder_path)
    first = model.get_submodule(layers[0])
    norms = _describe_norms(model, decoder_path, decoder)
    reasons = []
    for family in candidates(model_type):
        for wiring in family.wirings:
            anatomy, reason = _try_wiring(model, model_type, layers, first, norms, family, wiring)
            if anatomy is not None:
                return anatomy
            reasons.append(f"{wiring.name}: {reason}")
    raise InputError(
        f"the steps of a {model_type} model were not recognized ({'; '.join(dict.fromkeys(reasons))}); "
        "add a row for it to ofa/anatomy/families.py"
    )


def tuned_norms(model: nn.Module) -> tuple[Norm, ...]:
    """Every norm with a scale, in model order, also for models whose steps are not recognized.

    Raises:
        InputError: the model has no norm with a one-dimensional weight.
    """
    path, decoder = _decoder(model)
    return _describe_norms(model, path, decoder)


def _try_wiring(
    model: nn.Module,
    model_type: str,
    layers: tuple[str, ...],
    first: nn.Module,
    norms: tuple[Norm, ...],
    family: Family,
    wiring: Wiring,
) -> tuple[Anatomy | None, str]:
    missing = [path for path in _paths(wiring) if not _has(first, path)]
    if missing:
        return None, f"no module {missing[0]}"
    if wiring.scale and not hasattr(first, wiring.scale):
        return None, f"no attribute {wiring.scale}"
    by_path = {norm.path: norm for norm in norms}
    for layer in layers:
        _require_weights(model, layer, wiring, by_path)
    sublayer = tuple(step for i, layer in enumerate(layers) for step in _steps(model, i, layer, wiring, by_path))
    steps_of = [[step for step in sublayer if step.layer == i] for i in range(len(layers))]
    tried = next(i for i, own in enumerate(steps_of) if len(own) == len(wiring.steps))
    seen = _run_layer(model, layers[tried], _paths(wiring))
    reason = _contradiction(seen, layers[tried], steps_of[tried])
    if reason and family.layer_only and _norm_comes_after(seen, layers[0], sublayer):
        return _post_norm_layers(model_type, layers, norms, family.layer_only, by_path), ""
    if reason:
        return None, reason
    whole = tuple(_layer_step(i, layer, steps_of[i][0]) for i, layer in enumerate(layers))
    return Anatomy(model_type, wiring.name, layers, norms, sublayer, whole), ""


def _post_norm_layers(
    model_type: str, layers: tuple[str, ...], norms: tuple[Norm, ...], norm: str, by_path: dict[str, Norm]
) -> Anatomy:
    steps = tuple(
        Step(i, (Branch("layer", by_path[f"{layer}.{norm}"], layer, layer, "stream", "stream", False),))
        for i, layer in enumerate(layers)
    )
    return Anatomy(model_type, "post norm", layers, norms, (), steps)


def _steps(model: nn.Module, index: int, layer: str, wiring: Wiring, norms: dict[str, Norm]) -> Iterator[Step]:
    scale = float(getattr(model.get_submodule(layer), wiring.scale)) if wiring.scale else 1.0
    for rows in wiring.steps:
        if any(_has_no_norm(model, f"{layer}.{row.norm}") for row in rows):
            continue
        branches = tuple(_branch(layer, row, norms) for row in rows)
        yield Step(index, branches, scale, wiring.adds_in_place)


def _branch(layer: str, row: BranchRow, norms: dict[str, Norm]) -> Branch:
    return Branch(
        role=row.role,
        norm=norms[f"{layer}.{row.norm}"],
        entry=f"{layer}.{row.entry}",
        exit=f"{layer}.{row.exit}",
        reads=row.reads,
        writes=row.writes,
        norm_reads_stream=row.reads == "normalized",
        residual_reader=row.residual_reader and f"{layer}.{row.residual_reader}",
    )


def _layer_step(index: int, layer: str, first: Step) -> Step:
    branch = first.branches[0]
    whole = replace(
        branch, role="layer", entry=layer, exit=layer, reads="stream", writes="stream", residual_reader=None
    )
    return Step(index, (whole,))


def _paths(wiring: Wiring) -> tuple[str, ...]:
    rows = (row for step in wiring.steps for row in step)
    return tuple(dict.fromkeys(path for row in rows for path in (row.norm, row.entry, row.exit)))


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _has_no_norm(model: nn.Module, path: str) -> bool:
    """Whether a layer has nothing in a norm's place: ModernBERT's first attention reads the normalized embeddings."""
    return isinstance(model.get_submodule(path), nn.Identity)


def _require_weights(model: nn.Module, layer: str, wiring: Wiring, norms: dict[str, Norm]) -> None:
    for row in (row for step in wiring.steps for row in step):
        path = f"{layer}.{row.norm}"
        if path not in norms and not _has_no_norm(model, path):
            raise InputError(
                f"the norm {path} ({type(model.get_submodule(path)).__name__}) has no one-dimensional weight, so there "
                "is no scale to tune; choose a model whose norms have weights"
            )


def _decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the text decoder (or encoder), without the vision tower of a vision-language model."""
    if any(path.endswith("_checkpoint_wrapped_module") for path, _ in model.named_modules()):
        raise InputError(
            "the layers of this model are wrapped by apply_activation_checkpointing; tune the norms and attach the "
            "regularizers before wrapping them"
        )
    getter = getattr(model, "get_decoder", None)
    decoder = getter() if callable(getter) else model
    for path, module in model.named_modules():
        if module is decoder:
            return path, module
    return "", model


def _layer_paths(decoder: nn.Module, prefix: str) -> tuple[str, ...]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    config = getattr(decoder, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    unsplit = set(getattr(decoder, "_no_split_modules", None) or ())
    stacks = [(path, stack) for path, stack in decoder.named_modules() if isinstance(stack, nn.ModuleList) and stack]
    tests = (
        lambda stack: all(isinstance(layer, GradientCheckpointingLayer) for layer in stack),
        lambda stack: all(sharding.own_class(layer).__name__ in unsplit for layer in stack),
        lambda stack: len(stack) == count,
    )
    for test in tests:
        found = [(path, stack) for path, stack in stacks if test(stack)]
        if found:
            path, stack = max(found, key=lambda item: len(item[1]))
            return tuple(".".join(filter(None, (prefix, path, str(i)))) for i in range(len(stack)))
    raise InputError(
        f"no stack of decoder layers was found in a {type(decoder).__name__}; "
        "give a Hugging Face model whose layers are in a ModuleList"
    )


def _describe_norms(model: nn.Module, decoder_path: str, decoder: nn.Module) -> tuple[Norm, ...]:
    seen: dict[tuple[object, ...], tuple[str, float]] = {}
    norms = []
    for path, module in decoder.named_modules(prefix=decoder_path):
        if not _is_norm(module):
            continue
        eps = _eps(path, module)
        weight = module.weight
        formula = (sharding.own_class(module), eps, weight.numel(), weight.dtype)
        if formula not in seen:
            seen[formula] = _formula(path, module, eps)
        norms.append(Norm(path, *seen[formula], eps, weight.numel()))
    if not norms:
        raise InputError(
            f"no norm with a one-dimensional weight was found in a {type(model).__name__}, so there is no scale to "
            "tune; choose a model whose norms have weights"
        )
    return tuple(norms)


def _is_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    weight = getattr(module, "weight", None)
    return ("RMSNorm" in name or "LayerNorm" in name) and isinstance(weight, Tensor) and weight.dim() == 1


def _eps(path: str, module: nn.Module) -> float:
    for name in ("variance_epsilon", "eps", "epsilon"):
        if isinstance(value := getattr(module, name, None), float):
            return value
    raise InputError(
        f"the norm {path} ({type(module).__name__}) has no epsilon under a known name; choose a model with RMSNorm or "
        "LayerNorm"
    )


@torch.no_grad()
def _formula(path: str, module: nn.Module, eps: float) -> tuple[str, float]:
    """(kind, offset), found by calling the norm; with weight 0 only norms that compute (1 + w) return more than 0."""
    weight = sharding.full_tensor(module.weight)  # type: ignore[arg-type]
    bias = None if getattr(module, "bias", None) is None else sharding.full_tensor(module.bias)  # type: ignore[arg-type]
    own = {"module.weight": weight} | ({} if bias is None else {"module.bias": bias})
    bare = _Bare(module)
    ramp = torch.linspace(-1.0, 3.0, 2 * weight.numel(), device=weight.device).view(2, -1).to(weight.dtype)
    silent = torch.func.functional_call(bare, {**own, "module.weight": torch.zeros_like(weight)}, (ramp,))
    offset = float((silent - (0 if bias is None else bias)).abs().max() > 1e-3)
    answer = torch.func.functional_call(bare, own, (ramp,))
    for kind in reference.KINDS:
        expected = reference.norm_step(ramp, None, weight, bias, eps=eps, kind=kind, offset=offset)[1]
        if trial.close(answer, expected):
            return kind, offset
    raise InputError(
        f"the norm {path} ({type(module).__name__}) computes neither RMSNorm nor LayerNorm; choose a model with one of "
        "these"
    )


class _Bare(nn.Module):
    """A module without its hooks: those of `fully_shard` would gather parameters and leave the pass unfinished."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, hidden: Tensor) -> Tensor:
        """The module's output."""
        result: Tensor = self.module.forward(hidden)
        return result


def _run_layer(model: nn.Module, layer: str, paths: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of the layer and of some of its modules, from a run that stops after the layer."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def record(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: Any) -> None:
            # Clones, because some layers add into a branch's output.
            seen[path] = hidden_input(args, kwargs).clone(), hidden_output(output).clone()

        return hook

    targets = [layer, *(f"{layer}.{path}" for path in paths)]
    handles = [model.get_submodule(path).register_forward_hook(record(path), with_kwargs=True) for path in targets]
    try:
        trial.run(model, until=layer)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _contradiction(seen: dict[str, tuple[Tensor, Tensor]], layer: str, steps: list[Step]) -> str:
    """The first claim about the steps of one layer that the tensors contradict; empty if every claim holds."""
    stream, end = seen[layer]
    for step in steps:
        total = torch.zeros_like(stream)
        for branch in step.branches:
            unused = [path for path in (branch.norm.path, branch.entry, branch.exit) if path not in seen]
            if unused:
                return f"{unused[0]} is not called"
            normalized = branch.reads == "normalized"
            if normalized and not trial.close(seen[branch.norm.path][0], stream):
                return f"{branch.norm.path} does not read the residual stream"
            if not trial.close(seen[branch.entry][0], seen[branch.norm.path][1] if normalized else stream):
                source = "the norm's output" if normalized else "the residual stream"
                return f"{branch.entry} does not read {source}"
            written = trial.shaped(seen[branch.exit][1], stream)
            total = total + (written - stream if branch.writes == "stream" else step.scale * written)
        stream = stream + total
    return "" if trial.close(end, stream) else f"{layer} does not return the residual sum"


def _norm_comes_after(seen: dict[str, tuple[Tensor, Tensor]], layer: str, steps: tuple[Step, ...]) -> bool:
    """Whether the first layer's norms read the residual sums, and the last norm ends the layer, as in OPT-350m."""
    stream, end = seen[layer]
    own = [step.branches[0] for step in steps if step.layer == 0]
    if any(path not in seen for branch in own for path in (branch.norm.path, branch.exit)):
        return False
    for branch in own:
        read, stream_after = seen[branch.norm.path]
        if not trial.close(read, stream + trial.shaped(seen[branch.exit][1], stream)):
            return False
        stream = trial.shaped(stream_after, stream)
    return trial.close(end, stream)
