"""A few-shot text classifier with scikit-learn's interface; it needs the extra `ofa-adapt[sklearn]`."""

from __future__ import annotations

import functools
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from ofa.adaptation import adapt
from ofa.adapters.open import opened_adapter
from ofa.adapters.read import read_any_adapter
from ofa.errors import InputError
from ofa.evaluation.calibration import calibration_from
from ofa.evaluation.scorer import Scorer
from ofa.files import Json, claim_folder
from ofa.models.load import LoadedModel, load_model
from ofa.tasks import Example, Shots, Task, TaskData

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d
except ImportError as error:
    raise ImportError("ofa.sklearn needs scikit-learn: pip install 'ofa-adapt[sklearn]'") from error

Texts = Any
"""Texts as a list, a Series or an array of one dimension, or one column; or a DataFrame with the template's columns."""


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """Adapts a language model to labelled texts and classifies texts by its label words.

    All classifiers of one model share it, one at a time, and leave it as it was. A fitted classifier is the folder
    `adapter_`, temporary until `save`; it is pickled by that path once it is saved, before with the folder's files.

    Args:
        model: hub id, model folder or GGUF file; None is the embedded default.
        template: the prompt, with {text} or columns of a DataFrame in it.
        labels: the label word of each class, in the order of `classes_`; None takes the classes as they are written.
        method: one of `methods.ADAPTER_METHODS`; without it norm tuning, with the terms that have a weight.
        shots: examples per class to draw by `random_state`, or "all".
        epochs, max_steps, learning_rate, step_ratio, sharpness: settings of `TrainingConfig`; None is the method's own.
        settings: other settings by name, such as {"rank": 4} of LoRA.
        calibrate, chat, system: as for `adapt`.
        batch_size: texts per batch when predicting.
        dtype, device: as for `load_model`.

    Example:
        >>> from ofa.sklearn import FewShotClassifier
        >>> model.save_pretrained(folder)
        >>> _ = tokenizer.save_pretrained(folder)
        >>> classifier = FewShotClassifier(str(folder), template="{text}:", max_steps=2)
        >>> classifier.fit(["a joy", "a bore"], ["good", "bad"]).predict_proba(["a warm film"]).shape
        (1, 2)
        >>> classifier.classes_.tolist()
        ['bad', 'good']
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        template: str = "{text}\nLabel:",
        labels: Sequence[str] | None = None,
        method: str | None = None,
        shots: Shots = "all",
        random_state: int = 42,
        epochs: int | None = None,
        max_steps: int | None = None,
        learning_rate: float | None = None,
        step_ratio: float | None = None,
        sharpness: float | Literal["auto"] | None = None,
        settings: Mapping[str, object] | None = None,
        calibrate: str | None = None,
        chat: bool | None = None,
        system: str | None = None,
        batch_size: int = 16,
        dtype: str = "float32",
        device: str = "auto",
    ) -> None:
        self.model = model
        self.template = template
        self.labels = labels
        self.method = method
        self.shots = shots
        self.random_state = random_state
        self.epochs = epochs
        self.max_steps = max_steps
        self.learning_rate = learning_rate
        self.step_ratio = step_ratio
        self.sharpness = sharpness
        self.settings = settings
        self.calibrate = calibrate
        self.chat = chat
        self.system = system
        self.batch_size = batch_size
        self.dtype = dtype
        self.device = device

    def fit(self, X: Texts, y: ArrayLike) -> FewShotClassifier:
        """Adapt the model to texts and their classes.

        Raises:
            InputError: a text is empty, there is one class only, a label word or a setting cannot be used.
        """
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        check_consistent_length(X, y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        self.task_ = Task("sklearn", self.template, self._words())
        texts = self._texts(X)
        train = tuple(Example(text, self.task_.labels[number]) for text, number in zip(texts, numbers, strict=True))
        with self._alone() as loaded:
            adaptation = adapt(
                loaded.model,
                loaded.tokenizer,
                TaskData(self.task_, train),
                self.shots,
                self.random_state,
                method=self.method,
                calibrate=self.calibrate,
                chat=self.chat,
                system=self.system,
                **self._settings(),
            )
            self.task_ = adaptation.data.task
            try:
                folder = _temporary_folder(self)
                adaptation.save(folder, overwrite=True)
            finally:
                adaptation.close()
        self.adapter_ = str(folder)
        return self

    def predict_proba(self, X: Texts) -> np.ndarray:
        """Probability of each class in the order of `classes_`, (texts, classes)."""
        check_is_fitted(self)
        texts = self._texts(X)
        adapter = read_any_adapter(self.adapter_)
        calibration = calibration_from(adapter.details, self.task_.labels)
        with self._alone() as loaded, opened_adapter(loaded.model, adapter) as model:
            scorer = Scorer(model, loaded.tokenizer, self.task_, batch_size=self.batch_size, calibration=calibration)
            return scorer.predict_proba(texts).double().numpy()

    def predict(self, X: Texts) -> np.ndarray:
        """The most probable class of each text."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Copy the adapter to a folder that `ofa predict` and PEFT open, and use it there from now on.

        Raises:
            InputError: the folder cannot be written, or is not empty and `overwrite` is off.
        """
        check_is_fitted(self)
        target = claim_folder(folder, overwrite=overwrite).resolve()
        for file in _files(self.adapter_):
            shutil.copyfile(file, target / file.name)
        self.adapter_ = str(target)
        return target

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags

    def __getstate__(self) -> dict[str, object]:
        state = super().__getstate__()
        if _is_temporary(self):
            state = {**state, "adapter_": {file.name: file.read_bytes() for file in _files(self.adapter_)}}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if isinstance(files := state.get("adapter_"), dict):
            folder = _temporary_folder(self)
            for name, content in files.items():
                (folder / name).write_bytes(content)
            self.adapter_ = str(folder)

    @contextmanager
    def _alone(self) -> Iterator[LoadedModel]:
        loaded, lock = _shared(self.model, self.dtype, self.device)
        with lock:
            yield loaded

    def _words(self) -> tuple[str, ...]:
        if self.labels is None:
            return tuple(str(value) for value in self.classes_.tolist())
        if len(self.labels) != len(self.classes_):
            raise InputError(
                f"there are {len(self.labels)} labels for {len(self.classes_)} classes; give one label word for "
                f"each of {', '.join(map(str, self.classes_.tolist()))}, in this order"
            )
        return tuple(self.labels)

    def _settings(self) -> Json:
        names = ("epochs", "max_steps", "learning_rate", "step_ratio", "sharpness")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return {**given, **(self.settings or {})}

    def _texts(self, X: Texts) -> list[str]:
        names = self.task_.columns.names
        rows = X.to_dict("records") if hasattr(X, "to_dict") and np.ndim(X) == 2 else np.asarray(X, dtype=object)
        if isinstance(rows, np.ndarray):
            rows = rows[:, 0] if rows.ndim == 2 and rows.shape[1] == 1 else rows
            if rows.ndim != 1:
                raise InputError(f"X has the shape {rows.shape}; give a text per row, or a DataFrame with {names}")
        return [self.task_.text_of(row, f"text {number}") for number, row in enumerate(rows, start=1)]


@functools.lru_cache(maxsize=1)
def _shared(model: str | None, dtype: str, device: str) -> tuple[LoadedModel, threading.RLock]:
    """A loaded model, which classifiers use one after the other; the last one stays loaded for the next clone."""
    return load_model(model, dtype=dtype, device=device), threading.RLock()


_temporary: weakref.WeakKeyDictionary[FewShotClassifier, tuple[str, weakref.finalize[..., Any]]]
_temporary = weakref.WeakKeyDictionary()


def _temporary_folder(classifier: FewShotClassifier) -> Path:
    """A folder that is deleted with the classifier, or when it gets another."""
    if classifier in _temporary:
        _temporary[classifier][1]()
    folder = tempfile.mkdtemp(prefix="ofa-adapter-")
    delete = weakref.finalize(classifier, shutil.rmtree, folder, ignore_errors=True)
    _temporary[classifier] = folder, delete
    return Path(folder)


def _is_temporary(classifier: FewShotClassifier) -> bool:
    return classifier in _temporary and _temporary[classifier][0] == getattr(classifier, "adapter_", None)


def _files(folder: str) -> list[Path]:
    return sorted(file for file in Path(folder).iterdir() if not file.name.startswith("."))
