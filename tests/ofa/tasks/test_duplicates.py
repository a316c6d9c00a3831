"""Duplicates in the data are reported once, with an example and a count; nothing else is."""

from __future__ import annotations

import json

import pytest

from ofa.tasks import Example, duplicates, load_task, read_examples
from ofa.tasks.duplicates import warn_of_alike_labels, warn_of_duplicates, warn_of_shared_texts

TEMPLATE = "Text: {text}\nLabel:"


@pytest.fixture(autouse=True)
def _said_nothing_yet():
    duplicates._warn_once.cache_clear()


def labelled(*labels):
    return [Example(f"text {number}", label) for number, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (("Bug", "bug", "bug", "idea"), '"Bug" (1) and "bug" (2);'),
        (("bug report", "bug  report", "bugreport"), '"bug  report" (1) and "bug report" (1) and "bugreport" (1);'),
        (("bug report", "bug\u00a0report"), "\"bug report\" (1) and 'bug\\xa0report' (1);"),
        (("idea", "id\u200bea"), "\"idea\" (1) and 'id\\u200bea' (1);"),
        (("\u2764", "\u2764\ufe0f"), "\"\u2764\" (1) and '\\u2764\\ufe0f' (1);"),
        (("caf\u00e9", "cafe\u0301"), "'cafe\\u0301' (1) and \"caf\u00e9\" (1);"),
        (("Stra\u00dfe", "STRASSE", "x", "X"), '"STRASSE" (1) and "Stra\u00dfe" (1); "X" (1) and "x" (1);'),
    ],
)
def test_labels_that_look_alike_are_shown_with_their_counts(caplog, labels, shown):
    warn_of_alike_labels(labelled(*labels), "data.csv")
    assert "labels of data.csv differ only in case, blanks, invisible characters or Unicode form" in caplog.text
    assert f"a class of its own: {shown} spell labels" in caplog.text


@pytest.mark.parametrize("labels", [("cafe", "caf\u00e9"), ("a", "\u0430"), ("1", "-1"), ("bug", "bugs"), ("c", "c++")])
def test_labels_that_differ_visibly_are_not_reported(caplog, labels):
    warn_of_alike_labels(labelled(*labels), "data.csv")
    assert not caplog.text


A, B, OTHER = Example("a", "x"), Example("b", "x"), Example("a", "y")


@pytest.mark.parametrize(
    ("examples", "pairs", "said"),
    [
        ([A, B], False, []),
        ([A, B, A, A], False, ["has 1 text more than once, such as examples 1 and 3:"]),
        ([B, A, B, A], True, ["has 2 pairs more than once, such as examples 1 and 3:"]),
        ([B, A, OTHER], False, ['has 1 text under several labels, such as "x" in example 2 and "y" in example 3:']),
        ([A, OTHER, A], False, ["has 1 text more than once, such as examples 1 and 3", "has 1 text under several"]),
        ([A, OTHER], True, []),
    ],
)
def test_repeated_texts_are_reported_with_an_example(caplog, examples, pairs, said):
    """Once, even if the data is read again; one prompt may have several completions."""
    for _ in range(2):
        warn_of_duplicates(examples, "data.csv", pairs=pairs)
    assert len(caplog.messages) == len(said)
    for message, words in zip(caplog.messages, said, strict=True):
        assert message.startswith(f"data.csv {words}")


def test_test_texts_that_were_trained_on_are_counted(caplog):
    warn_of_shared_texts([A], [B], "here")
    assert not caplog.text
    warn_of_shared_texts([A, B], [OTHER, B, Example("c", "x")], "here")
    assert "2 of the 3 test texts of here are training texts too" in caplog.text


def test_every_loader_reports_duplicates_but_not_of_given_labels(caplog, tmp_path):
    """A file with and without labels, the examples of a known task, and both parts of a folder."""
    rows = [("a", "Bug"), ("b", "bug"), ("b", "bug")]
    lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    for name in ("data.jsonl", "train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(lines)
    labels = ("Bug", "bug")
    (tmp_path / "task.json").write_text(json.dumps({"name": "kinds", "template": TEMPLATE, "labels": labels}))
    said = []
    for load in (
        lambda: load_task(tmp_path / "data.jsonl", template=TEMPLATE),
        lambda: load_task(tmp_path / "data.jsonl", template=TEMPLATE, labels=labels),
        lambda: read_examples(tmp_path / "data.jsonl"),
        lambda: load_task(tmp_path),
    ):
        caplog.clear()
        duplicates._warn_once.cache_clear()
        load()
        said.append([words for words in ("differ only", "more than once", "test texts") if words in caplog.text])
    assert said == [
        ["differ only", "more than once"],
        ["more than once"],
        ["more than once"],
        ["more than once", "test texts"],
    ]
