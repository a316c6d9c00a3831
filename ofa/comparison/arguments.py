"""Read a method's arguments from the signature of its `fit`: settings from the grid, and examples besides the shots.

An argument named like a field of `MethodInputs` receives it. Every other one is a setting, and `**settings` stands for
the fields of `TrainingConfig`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from ofa.errors import InputError
from ofa.files import Json
from ofa.methods import SPECIAL_CASES, method
from ofa.methods.options import special_case
from ofa.tasks import Example, Task, did_you_mean

_COMMON = {"model", "tokenizer", "task", "shots", "seed"}
_OF_SINGLE_RUNS = {"folder", "resume", "validation", "progress"}


@dataclass(frozen=True)
class MethodInputs:
    """Optional inputs of a method besides the shots of its task."""

    pool: Sequence[Example]
    """All training examples of the task, including the shots."""
    other_tasks: Sequence[tuple[Task, Sequence[Example]]]
    """The other tasks of the grid, each with its shots of the same seed."""


_INPUTS = frozenset(field.name for field in fields(MethodInputs))


def inputs_for(name: str, inputs: MethodInputs) -> dict[str, object]:
    """The inputs that the signature of this method names, by argument."""
    return {part: getattr(inputs, part) for part in sorted(_INPUTS & _parameters(method(name)).keys())}


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
    return named - _COMMON - _OF_SINGLE_RUNS - _INPUTS


def _training_settings(fit: Callable[..., object]) -> set[str]:
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in _parameters(fit).values()):
        return set()
    from ofa.training.config import TrainingConfig

    return set(TrainingConfig.model_fields) - {"seed"}


def _parameters(fit: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(fit).parameters
