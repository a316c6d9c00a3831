"""Rows in memory, of any type, are read like the same rows in a file."""

from __future__ import annotations

import json

import datasets
import numpy
import pandas
import pytest

import ofa
from ofa.errors import InputError
from ofa.tasks import Example, Task, TaskData, examples_from, load_task

TEMPLATE = "Review: {text}\nSentiment:"
ROWS = [("dull and slow", "bad"), ("a warm film", "good"), ("far too long", "bad"), ("a joy", "good")]
NAMED = [{"text": text, "label": label, "source": "web"} for text, label in ROWS]
COLUMNS = {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
NUMBERS = [int(label == "good") for _, label in ROWS]
FEATURES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})

FORMS = {
    "pairs": lambda folder: ROWS,
    "lists": lambda folder: [list(row) for row in ROWS],
    "a generator": lambda folder: (row for row in ROWS),
    "zip": lambda folder: zip(COLUMNS["text"], COLUMNS["label"], strict=True),
    "mappings": lambda folder: NAMED,
    "examples": lambda folder: [Example(*row) for row in ROWS],
    "a DataFrame": lambda folder: pandas.DataFrame(NAMED),
    "a DataFrame of categories": lambda folder: pandas.DataFrame(NAMED).astype({"label": "category"}),
    "a DataFrame of numpy's strings": lambda folder: pandas.DataFrame(numpy.array(ROWS), columns=["Text", "LABEL"]),
    "a data set": lambda folder: datasets.Dataset.from_list(NAMED),
    "a data set of class numbers": lambda folder: datasets.Dataset.from_dict(
        {"text": COLUMNS["text"], "label": NUMBERS}, features=FEATURES
    ),
    "splits": lambda folder: datasets.DatasetDict(train=datasets.Dataset.from_list(NAMED)),
    "a stream": lambda folder: datasets.Dataset.from_list(NAMED).to_iterable_dataset(),
    "a path": lambda folder: folder / "rows.jsonl",
    "a path as text": lambda folder: str(folder / "rows.jsonl"),
}


@pytest.fixture(autouse=True)
def _file(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in NAMED))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_task_and_examples(tmp_path, form):
    loaded = load_task(form(tmp_path), template=TEMPLATE)
    assert loaded.train == tuple(Example(*row) for row in ROWS)
    assert (loaded.task.template, loaded.task.labels) == (TEMPLATE, ("bad", "good"))


@pytest.mark.parametrize("form", [form for name, form in FORMS.items() if name != "splits"])
def test_every_form_can_be_evaluated_on(tmp_path, form):
    """The labels must be those of the task."""
    task = Task("mood", TEMPLATE, ("good", "bad"))
    assert examples_from(form(tmp_path), task) == tuple(Example(*row) for row in ROWS)


def test_other_columns_and_several_of_them():
    """As in a file, the template names columns, and options name those of text and label."""
    rows = [
        {"premise": "it rains", "hypothesis": "it is wet", "gold": 1},
        {"premise": "a", "hypothesis": "b", "gold": 0},
    ]
    loaded = load_task(
        pandas.DataFrame(rows),
        template="{premise}\n{text}?",
        labels=("no", "yes"),
        text_column="hypothesis",
        label_column="gold",
    )
    assert [example.label for example in loaded.train] == ["yes", "no"]
    assert loaded.task.prompt(loaded.train[0].text) == "it rains\nit is wet?"


def test_splits_are_training_and_test_examples():
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(NAMED), test=datasets.Dataset.from_list(NAMED[:2]))
    loaded = load_task(both, template=TEMPLATE)
    assert (len(loaded.train), len(loaded.test)) == (4, 2)
    assert examples_from(loaded, loaded.task) == loaded.test


@pytest.mark.parametrize(
    ("data", "template", "words"),
    [
        (ROWS, None, r"pairs of text and label need a template"),
        ([*ROWS, ("no label",)], TEMPLATE, r"item 4 of the list is \('no label',\): write \(text, label\)"),
        ([*ROWS, "a film"], TEMPLATE, r"item 4 of the list is 'a film': write \(text, label\)"),
        ([*NAMED, {"text": "a film"}], TEMPLATE, r'item 4 of the list has no column "label"'),
        (
            pandas.DataFrame([*NAMED, {"text": "a film", "label": None}]),
            TEMPLATE,
            "row 4 of the DataFrame: the label is e",
        ),
        (pandas.DataFrame({"x": [1]}), TEMPLATE, 'row 0 of the DataFrame has no column "text"'),
        (ROWS, "{premise} {text}:", r"item 0 of the list does not name the columns premise, text"),
        ({"text": ["a film"]}, TEMPLATE, "examples cannot be read from a dict: give a path, a DataFrame"),
        (7, TEMPLATE, "examples cannot be read from a int"),
        ([], TEMPLATE, "the list has no examples"),
        (datasets.DatasetDict(dev=datasets.Dataset.from_list(NAMED)), TEMPLATE, r"no split train \(it has dev\)"),
        (TaskData(Task("mood", TEMPLATE, ("good", "bad")), ()), TEMPLATE, "brings its own template"),
    ],
)
def test_what_has_no_examples_is_refused_with_the_place(data, template, words):
    with pytest.raises(InputError, match=words):
        load_task(data, template=template)


def test_adapt_and_evaluate_take_them(tiny_model):
    """Adapt on a list, choose the epoch with a data set, evaluate on a DataFrame."""
    frame = pandas.DataFrame(NAMED)
    options = {"template": TEMPLATE, "shots": 1, "learning_rate": 1e-2, "epochs": 1, "calibrate": "none"}
    adaptation = ofa.adapt(*tiny_model, ROWS, validation=datasets.Dataset.from_list(NAMED), **options)
    measured = adaptation.evaluate(frame)
    assert measured.metrics == ofa.evaluate(*tiny_model, adaptation.data.task, ROWS).metrics
    assert adaptation.training.best_epoch == 1
    pairs = ofa.probe(*tiny_model, adaptation.data.task, ROWS, training=frame)
    assert len(pairs.lens.accuracy) == len(pairs.lens.loss) > 1
