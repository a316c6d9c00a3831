"""Full paths of the projections that LoRA and IA3 adapt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from ofa.anatomy.module_names import ATTENTION_NAMES, ENCODER_ATTENTION_NAMES, MLP_NAMES
from ofa.errors import InputError
from ofa.models.types import CausalLM


@dataclass(frozen=True)
class Projections:
    """Paths of the query, key, value and down projections of all layers, in model order.

    A fused projection is listed once for each of its parts. Mixtures of experts, and encoders whose MLP is two modules,
    have no down projections.
    """

    query: tuple[str, ...]
    key: tuple[str, ...]
    value: tuple[str, ...]
    down: tuple[str, ...]


def find_projections(model: CausalLM) -> Projections:
    """The projections of a Hugging Face model's text decoder, found by the names of its modules.

    Raises:
        InputError: no attention or no MLP has projections under known names.
    """
    attention = list(_with_children(model, (*ATTENTION_NAMES, *ENCODER_ATTENTION_NAMES)))
    mlp = list(_with_children(model, MLP_NAMES))
    apart = any(name.endswith((".experts", ".intermediate")) for name, _ in _decoder_modules(model))
    for what, found in (("an attention", attention), ("an MLP", mlp or apart)):
        if not found:
            raise InputError(
                f"no projections of {what} were found by name in a {type(model).__name__}; add their names to "
                "ofa/anatomy/module_names.py"
            )
    query, key, value = (tuple(paths[place] for paths in attention) for place in range(3))
    return Projections(query, key, value, tuple(paths[-1] for paths in mlp))


def stored_transposed(model: CausalLM, paths: Sequence[str]) -> bool:
    """Whether the first of these projections keeps its weight as (inputs, outputs), as GPT-2's do."""
    return type(model.get_submodule(paths[0])).__name__ == "Conv1D"


def _with_children(model: CausalLM, rows: Sequence[tuple[str | None, ...]]) -> Iterator[list[str]]:
    """Paths of the children of every decoder module that has all children named in a row."""
    for path, module in _decoder_modules(model):
        children = {name for name, _ in module.named_children()}
        for row in rows:
            names = [name for name in row if name is not None]
            if children.issuperset(names):
                yield [f"{path}.{name}" for name in names]
                break


def _decoder_modules(model: CausalLM) -> Iterator[tuple[str, nn.Module]]:
    decoder = model.get_decoder()
    prefix = next(path for path, module in model.named_modules() if module is decoder)
    return decoder.named_modules(prefix=prefix)
