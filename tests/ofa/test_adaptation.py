"""`adapt`: from a model and a few examples to predictions, saved scales, and a restored model."""

from __future__ import annotations

import json

import pytest
import torch

import ofa
from ofa.adapters.folder import DETAILS
from ofa.commands.adapted import base_of
from ofa.errors import InputError
from ofa.evaluation.scorer import Scorer
from ofa.methods import method
from ofa.models.introspection import note_source
from ofa.tasks import few_shot, load_task
from ofa.tasks.task import Example, Task, TaskData

TASK = Task(name="mood", template="Review: {text}\nSentiment:", labels=("negative", "positive"))
TRAIN = tuple(
    Example(text, label)
    for pair in zip(
        ("dull and slow", "far too long", "a bore from start to end", "it drags"),
        ("a warm film", "funny and warm", "never drags for a minute", "a joy"),
        strict=True,
    )
    for text, label in zip(pair, TASK.labels, strict=True)
)
DATA = TaskData(TASK, TRAIN)
TEXTS = ["a film that drags", "warm", "slow and dull and funny"]
QUICK = {"epochs": 2, "batch_size": 2, "learning_rate": 1e-2}


def scales_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def adapted(loaded, task=DATA, shots=2, seed=3, **settings):
    return ofa.adapt(*loaded, task, shots=shots, seed=seed, **{**QUICK, **settings})


def as_folder(path):
    path.mkdir()
    (path / "task.json").write_text(json.dumps(TASK.to_dict()))
    lines = [json.dumps({"text": e.text, "label": e.label}) for e in TRAIN]
    (path / "train.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_a_label_whose_tokens_begin_another_one_s_can_be_told_from_it(tiny_model):
    """Scored without an end, the longer label could never be the more probable one."""
    texts = ("warm", "funny", "never drags", "a joy", "dull", "slow", "far too long", "a bore")
    task = Task("kind", "{text}\nKind:", ("film", "film and"))
    data = TaskData(task, tuple(Example(text, task.labels[index % 2]) for index, text in enumerate(texts)))
    plain = {"step_ratio": 0.0, "sharpness": 0.0}
    adaptation = adapted(tiny_model, data, shots=4, epochs=100, batch_size=8, learning_rate=0.2, **plain)
    assert adaptation.predictor.evaluate(data.train).metrics.accuracy == 1.0


def test_a_model_with_an_open_adaptation_is_refused(tiny_model):
    """A second run would start from the scales of the first, and change its predictions."""
    adaptation = adapted(tiny_model)
    first = adaptation.predict_proba(TEXTS)
    with pytest.raises(InputError, match=r"holds an earlier adaptation, .*: close\(\) that first"):
        adapted(tiny_model)
    assert torch.equal(adaptation.predict_proba(TEXTS), first)
    adaptation.close()
    assert torch.equal(adapted(tiny_model).predict_proba(TEXTS), first)


def test_a_closed_adaptation_neither_predicts_nor_saves(tiny_model, tmp_path):
    """The model has its own scales again, or those of another adaptation."""
    adaptation = adapted(tiny_model)
    adaptation.close()
    adapted(tiny_model)
    for use in (
        lambda: adaptation.predict(TEXTS),
        lambda: adaptation.evaluate(DATA),
        lambda: adaptation.save(tmp_path),
    ):
        with pytest.raises(InputError, match="the adaptation is closed"):
            use()
    assert adaptation.details()["shots"] == 2


def test_a_text_instead_of_a_list_is_refused(tiny_model):
    """Its characters are no texts."""
    adaptation = adapted(tiny_model)
    for one in ("warm", {"text": "warm"}):
        with pytest.raises(InputError, match="the texts are a single one: put it into a list"):
            adaptation.predict(one)


def test_rows_of_several_columns_are_predicted_by_name(tiny_model):
    """A template of several columns predicts the same rows that it is trained on; a bare text is refused."""
    task = Task("nli", "{premise} / {text}:", ("yes", "no"))
    rows = [{"premise": f"p{n}", "text": f"h{n}", "label": task.labels[n % 2]} for n in range(4)]
    data = TaskData(task, tuple(Example(task.text_of(row), row["label"]) for row in rows))
    adaptation = adapted(tiny_model, data, epochs=1)
    by_row = adaptation.predict_proba(rows)
    torch.testing.assert_close(by_row, adaptation.predictor.predict_proba([f"p{n} / h{n}" for n in range(4)]))
    with pytest.raises(InputError, match="text 1 is one text, but the template has the columns premise, text"):
        adaptation.predict(["h0"])


# The task


@pytest.mark.parametrize("given", [str, lambda path: path], ids=["text", "path"])
def test_a_folder_and_the_task_it_holds_give_the_same_bits(tiny_model, tmp_path, given):
    """Same shots, same scales."""
    model, _ = tiny_model
    with_data = adapted(tiny_model)
    expected = scales_of(model)
    with_data.close()
    from_folder = adapted(tiny_model, given(as_folder(tmp_path / "task")))
    assert from_folder.drawn == with_data.drawn
    assert from_folder.data.task == TASK
    assert all(torch.equal(value, expected[name]) for name, value in scales_of(model).items())


def test_a_task_can_be_given_by_name(tiny_model):
    adaptation = adapted(tiny_model, "reviews", shots=1, epochs=1)
    known = load_task("reviews")
    assert adaptation.data == known
    assert [known.train[index] for index in adaptation.drawn.indices] == list(adaptation.drawn.examples)
    assert set(adaptation.predict(TEXTS)) <= set(known.task.labels)


def test_the_shots_are_the_draw_of_the_seed(tiny_model):
    """The examples at the indices, `shots` of each class; the same again for the same seed."""
    seen = {}
    for seed in (3, 3, 4):
        adaptation = adapted(tiny_model, seed=seed, epochs=1)
        drawn = adaptation.drawn
        adaptation.close()
        assert drawn == few_shot(TRAIN, TASK.labels, 2, seed)
        assert [TRAIN[index] for index in drawn.indices] == list(drawn.examples)
        assert sorted(example.label for example in drawn.examples) == ["negative"] * 2 + ["positive"] * 2
        assert seen.setdefault(seed, drawn.indices) == drawn.indices
    assert seen[3] != seen[4]


def test_seed_and_settings_reach_the_run(tiny_model):
    """The scales are those of the method itself on the drawn shots, and another seed has others."""
    model, tokenizer = tiny_model
    found = {}
    for seed in (3, 4):
        adaptation = adapted(tiny_model, seed=seed, step_ratio=0.3, sharpness=0.1, batch_size=3)
        found[seed] = scales_of(model)
        adaptation.close()
    shots = few_shot(TRAIN, TASK.labels, 2, 3).examples
    settings = {**QUICK, "step_ratio": 0.3, "sharpness": 0.1, "batch_size": 3}
    for seed in (3, 4):
        with method("ofa")(model, tokenizer, TASK, shots, seed, **settings):
            same = all(torch.equal(value, found[3][name]) for name, value in scales_of(model).items())
        assert same == (seed == 3)


def test_an_open_ended_task_is_adapted_to_its_completions(tiny_model):
    task = Task(name="sums", template="{text} =", labels=())
    data = TaskData(task, (Example("12 + 7", "19"), Example("1 + 1", "2"), Example("the capital of France", "Paris")))
    adaptation = adapted(tiny_model, data, epochs=3)
    records = adaptation.training.records
    assert records[-1].loss < records[0].loss
    assert len(adaptation.predict(["12 + 7"])) == 1


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (DATA, {"shots": 5}, r"has 4 training examples but 5 shots"),
        (DATA, {"shots": 0}, r"at least 1"),
        (TaskData(TASK, ()), {}, r'"mood" has no training examples'),
        ("revews", {}, r"reviews"),
        (DATA, {"epochs": 0}, r"epochs must be"),
        (DATA, {"step_ration": 0.1}, r"step_ration"),
        (DATA, {"probe": "normal"}, r"probe must be 'rademacher' or"),
        (DATA, {"resume": True}, r"folder"),
    ],
    ids=["too few", "no shots", "no examples", "no task", "range", "unknown", "option", "nothing to resume"],
)
def test_bad_input_is_refused_and_the_model_is_unchanged(tiny_model, task, options, message):
    before = {name: id(p) for name, p in tiny_model[0].named_parameters()}
    with pytest.raises(InputError, match=message):
        adapted(tiny_model, task, **options)
    assert {name: id(p) for name, p in tiny_model[0].named_parameters()} == before


# The adapted model


def test_predictions_are_the_tuned_models_until_close(tiny_model):
    """Labels are the most probable ones; close() restores the model's own scores."""
    model, tokenizer = tiny_model
    base = Scorer(model, tokenizer, TASK).predict_proba(TEXTS)
    adaptation = adapted(tiny_model)
    probabilities = adaptation.predict_proba(TEXTS)
    assert probabilities.shape == (3, 2)
    # Two probabilities of float32 sum to 1 within a rounding each.
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3), rtol=0, atol=3 * 2**-24)
    assert not torch.equal(probabilities, base)
    assert adaptation.predict(TEXTS) == [TASK.labels[index] for index in probabilities.argmax(1)]
    assert [record.step for record in adaptation.training.records] == [1, 2, 3, 4]
    adaptation.close()
    assert torch.equal(Scorer(model, tokenizer, TASK).predict_proba(TEXTS), base)


def test_a_bfloat16_model_is_tuned_by_float32_scales_that_move(tiny_model):
    """A bfloat16 scale near 1 would not move for steps below 2e-3; the frozen weights stay as they are."""
    model = tiny_model[0].to(torch.bfloat16)
    own = {name: p for name, p in model.named_parameters() if name.endswith("norm.weight")}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name not in own}
    adaptation = adapted(tiny_model, learning_rate=1e-3)
    for name, scale in scales_of(model).items():
        assert scale.dtype == torch.float32
        moved = (scale - 1).abs()
        # Four steps of at most 1e-3: too little for a bfloat16, and yet every norm moved.
        assert moved.max() > 1e-4
        assert moved.max() < 2**-8
        assert name in own
    for name, value in frozen.items():
        assert model.get_parameter(name).dtype == torch.bfloat16
        assert torch.equal(model.get_parameter(name), value)
    assert all(is_finite(record) for record in adaptation.training.records)
    adaptation.close()
    assert all(model.get_parameter(name) is p and p.dtype == torch.bfloat16 for name, p in own.items())


def is_finite(record):
    return torch.tensor([record.loss, record.penalty, record.gradient_norm, record.drift]).isfinite().all()


def test_metrics_and_checkpoint_go_to_the_folder_and_validation_chooses(tiny_model, tmp_path):
    """`folder`, `validation` and `progress` reach the run."""
    seen = []
    adaptation = adapted(
        tiny_model,
        folder=tmp_path / "run",
        validation=TRAIN[:2],
        progress=lambda record, total: seen.append((record.step, total)),
    )
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 4
    assert (tmp_path / "run" / "checkpoint.safetensors").is_file()
    assert adaptation.training.best_epoch in (1, 2)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


# Saving


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"sharpness": 0.1}, "ofa"), ({"sharpness": 0.1, "step_ratio": 1e-2}, "ofa"), ({}, "norm-tuning")],
    ids=["one half", "both", "neither"],
)
def test_the_folder_records_the_run_and_no_training_text(tiny_model, tmp_path, settings, name):
    """Task, shots, indices, seed and every setting, also defaults; and the caller's details."""
    adaptation = adapted(tiny_model, **settings)
    folder = adaptation.save(tmp_path / "adapter", scores={"accuracy": 0.5})
    details = json.loads((folder / DETAILS).read_text(encoding="utf-8"))
    assert details["task"] == TASK.to_dict()
    assert (details["shots"], details["seed"]) == (2, 3)
    assert details["indices"] == list(adaptation.drawn.indices)
    assert details["method"] == name
    expected = {**QUICK, "step_ratio": 0.0, "sharpness": 0.0, "weight_decay": 1e-3, "estimator": "auto", **settings}
    assert {key: details["settings"][key] for key in expected} == expected
    assert details["scores"] == {"accuracy": 0.5}
    assert details["seconds"] >= 0
    for path in folder.iterdir():
        content = path.read_bytes()
        assert [e.text for e in TRAIN if e.text.encode() in content] == []


@pytest.mark.parametrize("name", ["norm-tuning", "lora"])
def test_the_folder_names_the_copy_of_the_base_that_was_loaded(tiny_model, tmp_path, name):
    """The 4-bit default has the hub id of its original: without its source, `predict` would load other weights."""
    model, _ = tiny_model
    note_source(model, "embedded")
    adaptation = adapted(tiny_model, method=name)
    folder = adaptation.save(tmp_path / "adapter")
    adaptation.close()
    assert json.loads((folder / DETAILS).read_text())["base_source"] == "embedded"
    assert base_of(folder, None) == "embedded"


def test_a_saved_adapter_gives_the_same_predictions_on_the_base(tiny_model, tmp_path):
    """The scales are bit-identical; a folder that is not empty is kept without `overwrite`."""
    model, tokenizer = tiny_model
    adaptation = adapted(tiny_model)
    expected, scales = adaptation.predict_proba(TEXTS), scales_of(model)
    folder = adaptation.save(tmp_path / "adapter")
    with pytest.raises(InputError, match="already holds"):
        adaptation.save(folder)
    adaptation.save(folder, overwrite=True)
    adaptation.close()
    ofa.load_adapter(model, folder)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in scales.items())
    scorer = Scorer(model, tokenizer, TASK, calibration=adaptation.predictor.scorer.calibration)
    assert torch.equal(scorer.predict_proba(TEXTS), expected)
