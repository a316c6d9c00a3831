"""IA3: learned scales of keys, values and the MLP's inner activation (arXiv 2205.05638), by PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ofa.anatomy.projections import find_projections, stored_transposed
from ofa.methods import Predictor
from ofa.methods.peft_training import fit_adapter
from ofa.models.types import CausalLM, Tokenizer
from ofa.tasks.task import Example, Task

if TYPE_CHECKING:
    from peft import PeftConfig

SETTINGS = {"learning_rate": 3e-3}
"""Defaults that differ from `TrainingConfig`."""


def fit(
    model: CausalLM, tokenizer: Tokenizer, task: Task, shots: Sequence[Example], seed: int, **options: Any
) -> Predictor:
    """Train a scale, initially 1, per output of the key and value projections and per input of the MLP's last one.

    A fused projection that also computes queries is scaled whole, as in PEFT; `options` as for `fit_adapter`.

    Raises:
        InputError: see `fit_adapter`.
    """
    return fit_adapter(
        model, tokenizer, task, shots, seed, config_for, method="ia3", notes={}, **{**SETTINGS, **options}
    )


def config_for(model: CausalLM) -> PeftConfig:
    """PEFT's configuration of these scales for a model; without down projections only keys and values.

    Raises:
        InputError: the projections are not found.
    """
    from peft import IA3Config

    found = find_projections(model)
    inner = list(found.down)
    targets = list(dict.fromkeys((*found.key, *found.value, *inner)))
    return IA3Config(
        target_modules=targets, feedforward_modules=inner, fan_in_fan_out=stored_transposed(model, targets)
    )
