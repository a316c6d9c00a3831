"""LoRA: W + (α/r) B A on the query and value projections (arXiv 2106.09685), by PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ofa.anatomy.projections import find_projections, stored_transposed
from ofa.errors import InputError
from ofa.methods import Predictor
from ofa.methods.peft_training import fit_adapter
from ofa.models.types import CausalLM, Tokenizer
from ofa.tasks.task import Example, Task

if TYPE_CHECKING:
    from peft import PeftConfig


def fit(
    model: CausalLM,
    tokenizer: Tokenizer,
    task: Task,
    shots: Sequence[Example],
    seed: int,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    **options: Any,
) -> Predictor:
    """Train A (rank, inputs) and B (outputs, rank) of every query and value projection.

    A is uniform and B is 0 initially. A fused projection that also computes keys is adapted whole, as in PEFT. There
    is no dropout; `options` as for `fit_adapter`.

    Raises:
        InputError: `rank` is not a whole number of at least 1, or `alpha` is not above 0; see also `fit_adapter`.
    """
    if not isinstance(rank, int) or rank < 1:
        raise InputError(f"the rank of LoRA is {rank!r}: give a whole number of at least 1")
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise InputError(f"the alpha of LoRA is {alpha!r}: give a number above 0")
    notes = {"rank": rank, "alpha": alpha}
    return fit_adapter(
        model,
        tokenizer,
        task,
        shots,
        seed,
        lambda model: config_for(model, rank, alpha),
        notes=notes,
        method="lora",
        **options,
    )


def config_for(model: CausalLM, rank: int, alpha: float) -> PeftConfig:
    """PEFT's configuration of these adapters for a model.

    Raises:
        InputError: the projections are not found.
    """
    from peft import LoraConfig

    found = find_projections(model)
    targets = list(dict.fromkeys((*found.query, *found.value)))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=stored_transposed(model, targets),
    )
