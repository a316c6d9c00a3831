"""Read a method's arguments from the signature of its `fit`: settings from the grid, and examples besides the shots.

An argument `pool` receives all training examples of the task, the shots among them. Every other one is a setting, and
`**settings` stands for the fields of `TrainingConfig`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

from ofa.errors import InputError
from ofa.files import Json
from ofa.methods import SPECIAL_CASES, method
from ofa.methods.options import special_case
from ofa.tasks import Example, did_you_mean

_COMMON = {"model", "tokenizer", "task", "shots", "seed"}
_OF_SINGLE_RUNS = {"folder", "resume", "validation", "progress"}
_POOL = "pool"


def inputs_for(name: str, pool: Sequence[Example]) -> dict[str, object]:
    """The inputs that the signature of this method names besides the shots: the training examples of the task."""
    return {_POOL: pool} if _POOL in _parameters(method(name)) else {}


def check_settings(name: str, settings: Json) -> None:
    """Check early that the method accepts these settings.

    Raises:
        InputError: it has no such setting (the message suggests the nearest), or the value cannot be used.
    """
    fit = method(name)
    own, shared = _own_settings(fit), _training_settings(fit)
    known = sorted({*own, *shared})
    for setting in settings:
        if setting not in known:
            hint = did_you_mean(setting, known) or (f": use one of {', '.join(known)}" if known else ": it has none")
            raise InputError(f'the method {name} has no setting "{setting}"{hint}')
    special_case(name, settings, **SPECIAL_CASES.get(name, {}))
    trained = {setting: value for setting, value in settings.items() if setting in shared and setting not in own}
    if trained:
        _check_training(name, trained)


def _check_training(name: str, settings: Json) -> None:
    from ofa.training.config import TrainingConfig

    try:
        TrainingConfig(**settings)
    except InputError as error:
        raise InputError(f"in the method {name}, {error}") from error


def _own_settings(fit: Callable[..., object]) -> set[str]:
    named = {
        name for name, parameter in _parameters(fit).items() if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    return named - _COMMON - _OF_SINGLE_RUNS - {_POOL}


def _training_settings(fit: Callable[..., object]) -> set[str]:
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in _parameters(fit).values()):
        return set()
    from ofa.training.config import TrainingConfig

    return set(TrainingConfig.model_fields) - {"seed"}


def _parameters(fit: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(fit).parameters
