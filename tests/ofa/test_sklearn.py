"""`FewShotClassifier` keeps scikit-learn's habits, and the shared model stays as it was."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks

import ofa
import ofa.sklearn
from ofa.errors import InputError
from ofa.sklearn import FewShotClassifier
from tests.ofa.encoders import save_encoder
from tests.ofa.given_back import state

TEXTS = ["dull and slow", "a warm film", "far too long", "funny and warm", "a bore", "never drags"]
MOODS = ["bad", "good"] * 3


@pytest.fixture
def classifier(tiny_folder):
    return FewShotClassifier(str(tiny_folder), template="Review: {text}\nMood:", max_steps=1, learning_rate=1e-2)


def shared(classifier):
    loaded, _ = ofa.sklearn._shared(classifier.model, classifier.dtype, classifier.device)
    return loaded.model


def test_it_predicts_as_adapt_does_and_gives_the_model_back(classifier, tiny_model):
    """Also with classes that are numbers, whose words are given."""
    model, tokenizer = tiny_model
    before = state(shared(classifier))
    fitted = classifier.set_params(labels=["bad", "good"], calibrate="temperature").fit(TEXTS, [0, 1] * 3)
    probabilities = fitted.predict_proba(TEXTS)
    options = {"template": classifier.template, "max_steps": 1, "learning_rate": 1e-2, "calibrate": "temperature"}
    expected = ofa.adapt(model, tokenizer, list(zip(TEXTS, MOODS, strict=True)), "all", **options)
    np.testing.assert_allclose(probabilities, expected.predict_proba(TEXTS).numpy(), rtol=0, atol=1e-6)
    assert fitted.classes_.tolist() == [0, 1]
    assert fitted.predict(TEXTS).tolist() == probabilities.argmax(1).tolist()
    assert fitted.score(TEXTS, [0, 1] * 3) == np.mean(fitted.predict(TEXTS) == [0, 1] * 3)
    assert state(shared(classifier)) == before


@pytest.mark.parametrize("method", [None, "lora"])
def test_an_encoder_is_a_classifier_too(tiny_folder, tmp_path, method):
    """It learns its texts, and the shared model gets its own head back."""
    base = save_encoder("bert", tiny_folder, tmp_path / "bert")
    classifier = FewShotClassifier(str(base), template="{text}", method=method, max_steps=30)
    classifier.set_params(settings={"head_learning_rate": 0.1})
    before = state(shared(classifier))
    fitted = classifier.fit(TEXTS, MOODS)
    assert fitted.score(TEXTS, MOODS) == 1
    assert state(shared(classifier)) == before


@pytest.mark.parametrize("method", ["lora-ofa", "soft-prompt"])
def test_other_methods_give_the_model_back_too(classifier, method):
    before = state(shared(classifier))
    fitted = classifier.set_params(method=method, learning_rate=None).fit(TEXTS, MOODS)
    assert fitted.predict_proba(TEXTS[:2]).shape == (2, 2)
    assert state(shared(classifier)) == before


TOOLS = {
    "cross_val_score": lambda one: cross_val_score(one, TEXTS, MOODS, cv=2, error_score="raise"),
    "GridSearchCV": lambda one: (
        GridSearchCV(one, {"learning_rate": [1e-3, 1e-2]}, cv=2, error_score="raise")
        .fit(TEXTS, MOODS)
        .predict_proba(TEXTS)
    ),
    "CalibratedClassifierCV": lambda one: CalibratedClassifierCV(one, cv=2).fit(TEXTS, MOODS).predict_proba(TEXTS),
    "Pipeline": lambda one: (
        make_pipeline(FunctionTransformer(lambda texts: texts.str.strip()), one)
        .fit(pandas.Series(TEXTS), MOODS)
        .predict(pandas.Series(TEXTS))
    ),
}


@pytest.mark.parametrize("use", TOOLS.values(), ids=TOOLS)
def test_scikit_learns_tools_take_it_and_load_the_model_once(classifier, monkeypatch, use):
    loads = []
    load = ofa.sklearn.load_model
    monkeypatch.setattr(ofa.sklearn, "load_model", lambda *a, **k: loads.append(a) or load(*a, **k))
    ofa.sklearn._shared.cache_clear()
    assert np.isfinite(np.asarray(use(classifier) != "", dtype=float)).all()
    assert len(loads) == 1


def test_pickles_hold_the_adapter_or_once_saved_its_path(classifier, tmp_path):
    """Never the model; a temporary folder goes with its classifier."""
    fitted = clone(classifier).fit(TEXTS, MOODS)
    expected, temporary = fitted.predict_proba(TEXTS), Path(fitted.adapter_)
    copied = pickle.loads(pickle.dumps(fitted))
    assert Path(copied.adapter_) != temporary
    np.testing.assert_array_equal(copied.predict_proba(TEXTS), expected)
    weights = (temporary / "adapter_model.safetensors").stat().st_size
    saved = fitted.save(tmp_path / "adapter")
    assert len(pickle.dumps(fitted)) < weights
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict_proba(TEXTS), expected)
    del fitted
    assert not temporary.exists()
    assert saved.is_dir()


def test_a_template_with_columns_reads_a_data_frame(classifier):
    frame = pandas.DataFrame({"title": TEXTS, "body": TEXTS[::-1]})
    fitted = classifier.set_params(template="{title} / {body}\nMood:").fit(frame, MOODS)
    assert fitted.predict(frame).shape == (6,)


CHECKS = (
    "check_estimator_cloneable",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
    "check_estimator_repr",
    "check_no_attributes_set_in_init",
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_mixin_order",
    "check_parameters_default_constructible",
    "check_get_params_invariance",
    "check_set_params",
    "check_estimators_unfitted",
    "check_requires_y_none",
)


@pytest.mark.parametrize("check", CHECKS)
def test_scikit_learns_checks(classifier, check):
    """All of a classifier that fit nothing; the others fit matrices of random numbers, which are no texts."""
    getattr(estimator_checks, check)("FewShotClassifier", clone(classifier))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_check_estimator_finds_nothing(classifier):
    """It stops after its first check, since the tags say that the estimator takes no matrices."""
    results = estimator_checks.check_estimator(clone(classifier), on_skip=None)
    assert [result["check_name"] for result in results if result["status"] == "failed"] == []


def test_what_the_checks_on_numbers_protect_holds_for_texts(classifier):
    """check_estimators_fit_returns_self, check_estimators_overwrite_params, check_dict_unchanged, check_fit_idempotent,
    check_methods_sample_order_invariance, check_methods_subset_invariance."""
    params = classifier.get_params()
    assert classifier.fit(TEXTS, MOODS) is classifier
    assert classifier.get_params() == params
    before = dict(vars(classifier))
    probabilities = classifier.predict_proba(TEXTS)
    assert vars(classifier) == before
    np.testing.assert_allclose(classifier.predict_proba(TEXTS[::-1])[::-1], probabilities, atol=1e-6)
    np.testing.assert_allclose(classifier.predict_proba(TEXTS[2:3]), probabilities[2:3], atol=1e-6)
    np.testing.assert_array_equal(classifier.fit(TEXTS, MOODS).predict_proba(TEXTS), probabilities)


REFUSED = {
    "an empty text": (lambda one: one.fit(["", "a"], ["x", "y"]), InputError, "text"),
    "one class": (lambda one: one.fit(["a", "b"], ["x", "x"]), InputError, "at least two labels"),
    "a matrix": (lambda one: one.fit(np.ones((2, 2)), ["x", "y"]), InputError, r"X has the shape \(2, 2\)"),
    "too few words": (lambda one: one.set_params(labels=["a"]).fit(TEXTS, MOODS), InputError, "1 labels for 2"),
    "numbers to predict": (lambda one: one.fit(TEXTS, np.linspace(0, 1, 6)), ValueError, "continuous"),
    "not fitted": (lambda one: one.predict(TEXTS), NotFittedError, "is not fitted"),
}


@pytest.mark.parametrize(("use", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(classifier, use, kind, message):
    with pytest.raises(kind, match=message):
        use(classifier)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "ofa.sklearn")
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(ImportError, match=r"pip install 'ofa-adapt\[sklearn\]'"):
        import ofa.sklearn  # noqa: F401
