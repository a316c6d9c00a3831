"""Methods share one interface, and always restore the model."""

from __future__ import annotations

import signal

import pytest
import torch

import ofa
from ofa.adapters.folder import CHECKPOINT, METRICS
from ofa.errors import InputError
from ofa.evaluation.scorer import Scorer
from ofa.methods import METHODS, method
from ofa.tasks.task import Example
from ofa.training.loop import Diverged, Interrupted
from tests.ofa.given_back import SHOTS, TASK, TEXTS, at_step_2, restored, state

QUICK = {"epochs": 2, "batch_size": 2, "learning_rate": 1e-2}
OFF = {"step_ratio": 0.0, "sharpness": 0.0}


@pytest.fixture
def unchanged(tiny_model):
    yield from restored(*tiny_model)


def scales_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def trained(loaded, name, **options):
    """Scales and records of a method's run; the model is restored."""
    with method(name)(*loaded, TASK, SHOTS, 5, **{**QUICK, **options}) as predictor:
        return scales_of(loaded[0]), predictor.training.records


# The registry


def test_every_registered_method_has_a_fit():
    assert {"zero-shot", "icl", "norm-tuning", "ofa"} <= set(METHODS)
    assert all(callable(method(name)) for name in METHODS)


@pytest.mark.parametrize(
    ("name", "hint"), [("norm_tuning", "norm-tuning"), ("zeroshot", "zero-shot"), ("something else", "zero-shot, icl")]
)
def test_an_unknown_method_is_refused_with_the_nearest_name(name, hint):
    with pytest.raises(InputError, match=f'no method "{name}".*{hint}'):
        method(name)


# The methods


@pytest.mark.parametrize(("name", "demonstrations"), [("zero-shot", ()), ("icl", SHOTS)])
def test_methods_without_training_leave_the_model_untouched(unchanged, name, demonstrations):
    """Also after predictions; these equal the scores with and without the shots in context."""
    model, tokenizer = unchanged
    before = state(model)
    with method(name)(model, tokenizer, TASK, SHOTS, 5) as predictor:
        assert state(model) == before
        probabilities = predictor.predict_proba(TEXTS)
        assert predictor.training is None
        assert predictor.trainable_parameters == 0
        expected = Scorer(model, tokenizer, TASK, demonstrations=demonstrations).predict_proba(TEXTS)
        assert torch.equal(probabilities, expected)
        assert predictor.evaluate(SHOTS).probabilities.shape == (4, 2)
    assert torch.equal(expected, Scorer(model, tokenizer, TASK, demonstrations=demonstrations).predict_proba(TEXTS))


def test_norm_tuning_is_ofa_without_its_terms_bit_for_bit(unchanged):
    """And it takes no other weights."""
    expected, records = trained(unchanged, "ofa", **OFF)
    scales, own = trained(unchanged, "norm-tuning")
    assert all(torch.equal(scales[name], value) for name, value in expected.items())
    assert [record.loss for record in own] == [record.loss for record in records]
    assert {(record.step_ratio, record.sharpness, record.penalty) for record in own} == {(None, None, 0.0)}
    with pytest.raises(InputError, match=r"norm-tuning means sharpness=0\.0, not 1\.0"):
        trained(unchanged, "norm-tuning", sharpness=1.0)


def test_ofa_has_the_sharpness_by_default_and_another_result(unchanged):
    scales, records = trained(unchanged, "ofa")
    plain, _ = trained(unchanged, "norm-tuning")
    assert all(record.step_ratio is None and record.sharpness > 0 for record in records)
    assert all(r.penalty == pytest.approx(0.1 * r.sharpness, rel=1e-6) for r in records)
    assert any(not torch.equal(scales[name], value) for name, value in plain.items())


@pytest.mark.parametrize("name", ["norm-tuning", "ofa"])
def test_a_trained_predictor_predicts_with_the_tuned_scales_until_it_is_closed(unchanged, name):
    """It counts its scales (7 norms of 64), and close() restores the model's own parameters."""
    model, tokenizer = unchanged
    base = Scorer(model, tokenizer, TASK).predict_proba(TEXTS)
    predictor = method(name)(model, tokenizer, TASK, SHOTS, 5, **QUICK)
    assert predictor.trainable_parameters == 7 * 64
    assert len(predictor.training.records) == 4
    assert all((scale != 1).any() for scale in scales_of(model).values())
    probabilities = predictor.predict_proba(TEXTS)
    assert not torch.equal(probabilities, base)
    # The labels follow from the same probabilities.
    assert predictor.predict(TEXTS) == [TASK.labels[index] for index in probabilities.argmax(1)]
    assert torch.equal(predictor.evaluate(SHOTS).probabilities, predictor.predict_proba([shot.text for shot in SHOTS]))
    predictor.close()
    predictor.close()
    assert torch.equal(Scorer(model, tokenizer, TASK).predict_proba(TEXTS), base)


def test_the_seed_fixes_the_result_whatever_was_drawn_before(unchanged):
    """It fixes batches and probes, in any state of the global generators."""
    first, _ = trained(unchanged, "ofa")
    torch.manual_seed(999)
    torch.rand(7)
    again, _ = trained(unchanged, "ofa")
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_validation_keeps_the_epoch_of_the_best_accuracy(unchanged):
    """The validation labels are a first run's predictions in its third epoch, so accuracy is 1 there."""
    model, tokenizer = unchanged
    texts = [*TEXTS, *(shot.text for shot in SHOTS), "a warm film", "too long, but it is funny"]
    predictions, scales = [], []

    def progress(record, total):
        if record.step % 2 == 0:
            predictions.append(tuple(Scorer(model, tokenizer, TASK).predict(texts)))
            scales.append(scales_of(model))

    settings = {"epochs": 6, "learning_rate": 0.05}
    trained(unchanged, "norm-tuning", progress=progress, **settings)
    validation = [Example(text, label) for text, label in zip(texts, predictions[2], strict=True)]
    best = 1 + predictions.index(predictions[2])
    # The best epoch must be neither first nor last, or keeping those by mistake would pass.
    assert 1 < best < 6
    assert predictions[-1] != predictions[2]
    options = {**QUICK, **settings, "validation": validation}
    with method("norm-tuning")(model, tokenizer, TASK, SHOTS, 5, **options) as predictor:
        assert predictor.training.best_epoch == best
        assert all(torch.equal(value, scales[best - 1][name]) for name, value in scales_of(model).items())
        assert predictor.predict(texts) == list(predictions[2])


# Failures


class Broken(Exception):
    pass


def fail():
    raise Broken


FAILURES = {
    "an exception of the caller": (Broken, lambda model: at_step_2(fail)),
    "Ctrl-C": (Interrupted, lambda model: at_step_2(lambda: signal.raise_signal(signal.SIGINT))),
    "SIGTERM": (Interrupted, lambda model: at_step_2(lambda: signal.raise_signal(signal.SIGTERM))),
    "divergence": (
        Diverged,
        lambda model: at_step_2(
            lambda: model.get_parameter("model.norm.weight").register_hook(lambda g: g * float("nan"))
        ),
    ),
    "a wrong setting": (InputError, lambda model: {"epochs": 0}),
    "an unknown estimator": (InputError, lambda model: {"estimator": "guess"}),
    "no checkpoint": (InputError, lambda model: {"resume": True}),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_fit_that_fails_leaves_the_model_as_it_was(unchanged, tmp_path, name):
    """Parameters, flags, modes and hooks (the fixture's check), and it can be fitted again."""
    model, tokenizer = unchanged
    error, options = FAILURES[name]
    before = state(model)
    with pytest.raises(error):
        method("ofa")(model, tokenizer, TASK, SHOTS, 5, **{**QUICK, "folder": tmp_path / "run", **options(model)})
    assert state(model) == before
    scales, _ = trained(unchanged, "ofa")
    assert len(scales) == 7


def test_an_interrupted_fit_resumes_to_the_same_bits(unchanged, tmp_path):
    """Through the method's own options, with a str as the folder."""
    expected, records = trained(unchanged, "ofa")
    with pytest.raises(Interrupted):
        trained(unchanged, "ofa", folder=str(tmp_path), **at_step_2(lambda: signal.raise_signal(signal.SIGINT)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, METRICS]
    scales, own = trained(unchanged, "ofa", folder=str(tmp_path), resume=True)
    assert all(torch.equal(scales[name], value) for name, value in expected.items())
    assert [record.loss for record in own] == [record.loss for record in records]


def test_regularizers_of_the_caller_are_refused_and_kept(unchanged):
    """They would add to the loss of the run."""
    with ofa.fused_regularizers(unchanged[0]) as own:
        with pytest.raises(InputError, match="already has regularizers"):
            trained(unchanged, "ofa")
        assert own.steps
