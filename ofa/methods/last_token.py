"""Record the outputs of modules at the last token of a text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ofa.anatomy.module_io import hidden_output
from ofa.evaluation.prefix_cache import PrefixCache
from ofa.models.introspection import evaluating, hooked
from ofa.models.types import CausalLM


def last_token_outputs(model: CausalLM, paths: Sequence[str], ids: Sequence[int]) -> list[Tensor]:
    """Output (d,) of each module at the last token of `ids`, in its own dtype, from one forward."""
    modules = [model.get_submodule(path) for path in paths]
    outputs: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, args: object, output: object) -> None:
        hidden = hidden_output(output)
        # OPT's MLP has no batch dimension. Clone, because some layers add to a branch's output in place.
        outputs[module] = hidden.reshape(-1, hidden.shape[-1])[-1].clone()

    with hooked(modules, record), evaluating(model):
        PrefixCache(model, (), pad_id=0).last_logits([ids])
    return [outputs[module] for module in modules]
