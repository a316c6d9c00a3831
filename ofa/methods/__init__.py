"""Adaptation methods with one interface: `fit(model, tokenizer, task, shots, seed) → Predictor`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING

from ofa.errors import InputError
from ofa.files import Json

if TYPE_CHECKING:
    from torch import Tensor

    from ofa.evaluation.scorer import Evaluation, Progress, Scorer
    from ofa.tasks.task import Example
    from ofa.training.records import TrainingResult

METHODS = {
    "zero-shot": "ofa.methods.in_context:fit_zero_shot",
    "icl": "ofa.methods.in_context",
    "icl-calibrated": "ofa.methods.calibrated_in_context",
    "linear-probe": "ofa.methods.linear_probe",
    "centroids": "ofa.methods.centroids",
    "soft-prompt": "ofa.methods.soft_prompt",
    "label-anchor": "ofa.methods.label_anchor",
    "task-vector": "ofa.methods.task_vector",
    "ia3": "ofa.methods.ia3",
    "lora": "ofa.methods.lora",
    "lora-r1": "ofa.methods.lora",
    "lora-ofa": "ofa.methods.lora",
    "ia3-ofa": "ofa.methods.ia3",
    "i2cl": "ofa.methods.i2cl",
    "norm-tuning": "ofa.methods.norm_tuning:fit_ofa",
    "ofa": "ofa.methods.norm_tuning:fit_ofa",
    "ofa-paper": "ofa.methods.norm_tuning:fit_ofa_paper",
    "ofa-step-ratio": "ofa.methods.norm_tuning:fit_ofa",
    "guided": "ofa.methods.guided",
    "guided-first-order": "ofa.methods.guided",
}
"""Map each method to a "module" with a `fit`, or to "module:function"; modules are imported on use."""

_UNREGULARIZED = {"step_ratio": 0.0, "sharpness": 0.0}
_SHARPNESS = {"sharpness": 0.1}

SPECIAL_CASES: dict[str, Json] = {
    "lora-r1": {"rank": 1},
    "lora-ofa": {"with_norms": True, "defaults": _SHARPNESS},
    "ia3-ofa": {"with_norms": True, "defaults": _SHARPNESS},
    "norm-tuning": _UNREGULARIZED,
    "ofa": {"defaults": _SHARPNESS},
    "ofa-step-ratio": {"term": "step_ratio", "defaults": {"step_ratio": 1e-2}, "sharpness": 0.0},
    "guided": {"variant": "guided", **_UNREGULARIZED},
    "guided-first-order": {"variant": "guided-first-order", **_UNREGULARIZED},
}
"""Map methods to the options whose values define them, see `options.special_case`."""

DEMONSTRATING = ("icl", "icl-calibrated", "label-anchor", "task-vector", "i2cl")
"""Methods that read the shots as demonstrations, which a chat has no turns for."""

GUIDED = tuple(name for name, place in METHODS.items() if place.startswith("ofa.methods.guided"))
"""Methods whose runs keep no checkpoint: it would not hold what the guidance remembers."""

NORM_METHODS = tuple(name for name, place in METHODS.items() if "norm_tuning" in place or name in GUIDED)
"""Methods that train the norm scales, which are saved as a PEFT LN-tuning adapter."""

WITH_NORMS = tuple(name for name, case in SPECIAL_CASES.items() if case.get("with_norms"))
"""Methods that train the norm scales beside an adapter of PEFT, which keeps them as its `modules_to_save`."""

ADAPTER_METHODS = (*NORM_METHODS, "lora", "lora-r1", "ia3", *WITH_NORMS, "soft-prompt")
"""Methods whose result is an adapter in one of PEFT's formats: those of `adapt` and `ofa fit`."""


@dataclass(frozen=True)
class Predictor:
    """A model adapted to a task. `close` restores the model.

    Attributes:
        scorer: scores the labels with the adapted model.
        release: restores the model; None if the method does not modify it.
        trainable_parameters: number of trained parameters.
        training: None if the method trains nothing.
        contexts: what may precede a text in a test: nothing ("prompt"), the shots ("demonstrations").
        stored_bytes: size of the saved adaptation, without the shots.
        notes: the method's own records, as JSON values.

    Example:
        >>> from ofa.methods import method
        >>> task = ofa.Task("mood", "{text}:", ("bad", "good"))
        >>> shots = [ofa.Example("a joy", "good"), ofa.Example("far too long", "bad")]
        >>> with method("centroids")(model, tokenizer, task, shots, seed=0) as predictor:
        ...     len(predictor.predict(["a warm film"])), predictor.predict_proba(["it drags"]).shape
        ...     predictor.evaluate(shots).metrics.count
        (1, torch.Size([1, 2]))
        2
        >>> predictor.close()
    """

    scorer: Scorer
    release: Callable[[], None] | None = None
    trainable_parameters: int = 0
    training: TrainingResult | None = None
    contexts: tuple[str, ...] = ("prompt", "demonstrations")
    stored_bytes: int = 0
    notes: Json = field(default_factory=dict)

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The most probable label of each text."""
        return self.scorer.predict(texts)

    def predict_proba(self, texts: Sequence[str]) -> Tensor:
        """Probability of each label, (texts, labels), float32."""
        return self.scorer.predict_proba(texts)

    def evaluate(
        self,
        examples: Sequence[Example],
        *,
        demonstrations: Sequence[Example] | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Predict the examples with this method and measure the predictions, see `evaluation.scorer.evaluate`.

        Demonstrations and batch size default to the scorer's.
        """
        scorer = copy(self.scorer)
        if demonstrations is not None:
            scorer.demonstrations = tuple(demonstrations)
        if batch_size is not None:
            scorer.batch_size = batch_size
        return scorer.evaluate(examples, progress=progress)

    def close(self) -> None:
        """Restore the model to its state before `fit`."""
        if self.release is not None:
            self.release()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def method(name: str) -> Callable[..., Predictor]:
    """The `fit` of a method by name.

    Raises:
        InputError: there is no such method; the message suggests the nearest name.
    """
    from ofa.tasks import did_you_mean

    if name not in METHODS:
        hint = did_you_mean(name, tuple(METHODS)) or f": use one of {', '.join(METHODS)}"
        raise InputError(f'there is no method "{name}"{hint}')
    module, _, function = METHODS[name].partition(":")
    fit = getattr(import_module(module), function or "fit")
    return _special(name, fit, SPECIAL_CASES[name]) if name in SPECIAL_CASES else fit


def _special(name: str, fit: Callable[..., Predictor], case: Json) -> Callable[..., Predictor]:
    """`fit` with fixed options, which are no part of its signature."""
    from ofa.methods.options import special_case

    @wraps(fit)
    def special(*given: object, **options: object) -> Predictor:
        return fit(*given, **special_case(name, options, **case))

    signature = inspect.signature(fit)
    left = [parameter for parameter in signature.parameters.values() if parameter.name not in case]
    special.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
    return special


def default_method(settings: Json) -> str:
    """Norm tuning, or the method with the terms whose weights are among the settings."""
    if settings.get("sharpness"):
        return "ofa"
    return "ofa-step-ratio" if settings.get("step_ratio") else "norm-tuning"


def adapter_method(name: str) -> Callable[..., Predictor]:
    """The `fit` of a method whose result can be saved.

    Raises:
        InputError: there is no such method, or its result has no format of PEFT.
    """
    fit = method(name)
    if name not in ADAPTER_METHODS:
        raise InputError(
            f"the result of {name} has no adapter format of PEFT and cannot be saved; measure it with `ofa compare`, "
            f"or use one of {', '.join(ADAPTER_METHODS)}"
        )
    return fit
