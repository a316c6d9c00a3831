"""Guided norm tuning: without weights it equals norm tuning, with them it differs, and the model is restored."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from ofa.errors import InputError
from ofa.evaluation.scorer import Scorer
from ofa.methods import method
from ofa.training.loop import Diverged, Interrupted
from ofa.tuning.norms import restore_norms
from tests.ofa.given_back import SHOTS, TASK, TEXTS, at_step_2, state

EXACT, FIRST_ORDER = VARIANTS = ("guided", "guided-first-order")
QUICK = {"epochs": 4, "batch_size": 2, "learning_rate": 1e-2}
OFF = {"direction": 0.0, "magnitude": 0.0}
STRONG = {
    EXACT: {"direction": 0.3, "magnitude": 0.1},
    FIRST_ORDER: {"direction": 0.3, "magnitude": 1.0},
}


@pytest.fixture
def unchanged(tiny_model):
    """A tiny model with mixed modes and flags; checks that the test restores them."""
    model, tokenizer = tiny_model
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    before = state(model), model.config.to_dict()
    yield model, tokenizer
    assert (state(model), model.config.to_dict()) == before


def trained(loaded, fit, **options):
    """Tuned scales, records and notes of a run; the model is restored."""
    with fit(*loaded, TASK, SHOTS, 5, **{**QUICK, **options}) as predictor:
        scales = {name: p.detach().clone() for name, p in loaded[0].named_parameters() if p.requires_grad}
        return scales, predictor.training.records, predictor.notes


# Training


@pytest.mark.parametrize("name", VARIANTS)
def test_without_weights_it_is_norm_tuning_bit_for_bit(unchanged, name):
    """Scales after four epochs and the loss of every step."""
    expected, records, _ = trained(unchanged, method("norm-tuning"))
    scales, own, _ = trained(unchanged, method(name), **OFF)
    assert scales.keys() == expected.keys()
    assert all(torch.equal(scales[path], value) for path, value in expected.items())
    assert [record.loss for record in own] == [record.loss for record in records]
    assert [record.gradient_norm for record in own] == [record.gradient_norm for record in records]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_term_changes_the_result(unchanged, name):
    """Each term alone differs from norm tuning. The rate is high, so that some ‖g‖ exceed the first epoch's."""
    fast = {"learning_rate": 0.1}
    plain, _, _ = trained(unchanged, method("norm-tuning"), **fast)
    for setting in ("direction", "magnitude"):
        scales, _, notes = trained(unchanged, method(name), **{**fast, **OFF, setting: 0.5})
        assert any(not torch.equal(scales[path], value) for path, value in plain.items()), setting
        if setting == "magnitude":
            assert max(notes["gradient_norm"][2:]) > notes["gradient_norm_threshold"]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_fit_learns_its_shots_logs_its_gradients_and_is_restored(unchanged, name):
    """Default weights; after closing (twice), the model's scores are bit-identical to before."""
    model, tokenizer = unchanged
    base = Scorer(model, tokenizer, TASK).predict_proba(TEXTS)
    predictor = method(name)(model, tokenizer, TASK, SHOTS, 5, **{**QUICK, "epochs": 10, "learning_rate": 0.05})
    assert (predictor.trainable_parameters, predictor.stored_bytes) == (7 * 64, 7 * 64 * 4)
    assert predictor.contexts == ("prompt", "demonstrations")
    losses = [record.loss for record in predictor.training.records]
    assert losses[-1] < losses[0] - 0.1
    notes = json.loads(json.dumps(predictor.notes))
    assert len(notes["gradient_norm"]) == len(notes["cosine_to_previous"]) == len(notes["cosine_to_average"]) == 20
    assert notes["cosine_to_previous"][0] is None
    assert all(-1 <= cosine <= 1 for cosine in (*notes["cosine_to_previous"][1:], *notes["cosine_to_average"]))
    assert notes["gradient_norm_std"] > 0
    assert not torch.equal(predictor.predict_proba(TEXTS), base)
    predictor.close()
    predictor.close()
    assert torch.equal(Scorer(model, tokenizer, TASK).predict_proba(TEXTS), base)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_seed_fixes_the_result(unchanged, name):
    first, _, notes = trained(unchanged, method(name), **STRONG[name])
    torch.manual_seed(999)
    again, _, own = trained(unchanged, method(name), **STRONG[name])
    assert all(torch.equal(again[path], value) for path, value in first.items())
    assert own == notes


def test_validation_keeps_the_best_epoch(unchanged):
    """Validation labels are the untrained model's predictions, so the first epoch is best."""
    examples = [type(SHOTS[0])(text, Scorer(*unchanged, TASK).predict([text])[0]) for text in TEXTS]
    options = {**QUICK, **STRONG[FIRST_ORDER], "learning_rate": 1e-6, "validation": examples}
    with method(FIRST_ORDER)(*unchanged, TASK, SHOTS, 5, **options) as predictor:
        assert predictor.training.best_epoch == 1


@pytest.mark.parametrize("name", VARIANTS)
def test_a_bfloat16_model_is_guided(tiny_model, name):
    """Its scales are float32, and so is their gradient."""
    model, tokenizer = tiny_model[0].bfloat16(), tiny_model[1]
    scales, records, _ = trained((model, tokenizer), method(name), **STRONG[name])
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in scales.values())
    assert len(records) == 8


# Refusals and failures


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (EXACT, {"direction": -1.0}, r"direction=-1.0 .* at least 0"),
        (FIRST_ORDER, {"magnitude": 2.0}, r"magnitude=2.0 .* at most 1"),
        (EXACT, {"sharpness": 0.1}, r"guided means sharpness=0.0"),
        (EXACT, {"accumulation": 2}, r"takes neither accumulation"),
        (FIRST_ORDER, {"speed": 2}, r"no setting speed"),
    ],
)
def test_wrong_options_are_refused(unchanged, name, options, words):
    with pytest.raises(InputError, match=words):
        method(name)(*unchanged, TASK, SHOTS, 5, **{**QUICK, **options})


def break_gradient(model):
    model.get_parameter("model.norm.weight").register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("error", [Interrupted, Diverged])
def test_a_fit_that_fails_leaves_the_model_as_it_was(unchanged, name, error):
    """On Ctrl-C, and at a gradient that is not a number; the fixture compares the state."""
    model, _ = unchanged
    act = {Interrupted: lambda: signal.raise_signal(signal.SIGINT), Diverged: lambda: break_gradient(model)}[error]
    with pytest.raises(error):
        trained(unchanged, method(name), **STRONG[name], **at_step_2(act))


def test_attention_without_a_second_derivative_is_refused_before_anything_is_touched(tiny_model):
    model, _ = tiny_model
    model.config._attn_implementation = "flash_attention_2"
    before = state(model)
    with pytest.raises(InputError, match="attn_implementation='sdpa' or 'eager'"):
        trained(tiny_model, method(EXACT))
    assert state(model) == before
    restore_norms(model)
