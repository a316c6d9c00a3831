"""Tasks: accepted and refused fields, and the rendered prompts."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ofa.errors import InputError
from ofa.tasks import Example, Task, unescape_template

TASK = Task("sst2", "Review: {text}\nSentiment:", ("negative", "positive"))


def test_prompt_target_and_demonstration_follow_the_protocol():
    assert TASK.prompt("dull") == "Review: dull\nSentiment:"
    assert TASK.target("negative") == " negative"
    assert TASK.demonstration(Example("dull", "negative")) == "Review: dull\nSentiment: negative\n"


@pytest.mark.parametrize("text", ["{text}", "{}", "{0} {name}", "100 %s", "\\1", "{{text}}"])
def test_the_text_is_inserted_verbatim(text):
    assert Task("t", "{} {text} {{b}} }:", ("x", "y")).prompt(text) == "{} " + text + " {b} }:"


NLI = Task("nli", "Premise: {premise}\nHypothesis: {text}\nLabel:", ("yes", "no"), text_column="Hypothesis")


def test_a_template_takes_any_columns_of_a_row():
    row = {"premise": "a {text} ", "HYPOTHESIS": "b", "other": "c"}
    text = NLI.text_of(row)
    assert NLI.prompt(text) == "Premise: a {text}\nHypothesis: b\nLabel:"
    assert NLI.to_dict()["columns"] == ["premise", "Hypothesis"]
    assert Task.from_dict(NLI.to_dict()) == NLI


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "b"}, 'no column "premise"'),
        ({"premise": "a", "text": "b"}, 'no column "Hypothesis" .*name the right one with --text-column'),
        ({"premise": "a", "hypothesis": " "}, "the Hypothesis is empty"),
        ({"premise": ["a"], "Hypothesis": "b"}, "which is not text"),
        ({"premise": "a", "hypothesis": "b", "hypothesiS": "c"}, "both hypothesis and hypothesiS may be meant"),
        ("a text", "the columns premise, Hypothesis"),
    ],
)
def test_a_row_that_does_not_fill_the_template_is_refused(row, complaint):
    with pytest.raises(InputError, match=complaint):
        NLI.text_of(row)


def test_a_single_value_follows_the_rules_of_a_row():
    task = Task("t", "{text}:", ("yes", "no"))
    assert [task.text_of(value) for value in (" a joy ", 3, True)] == ["a joy", "3", "true"]
    for value, complaint in ((None, "row 1: the text is empty"), (" ", "the text is empty"), (["a"], "is not text")):
        with pytest.raises(InputError, match=complaint):
            task.text_of(value, "row 1")


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ('{"review": "{text}", "label":', '{"review": "T", "label":'),
        ("{{text}} {text}:", "{text} T:"),
        (r"a\tb\\n{text}:", "a\tb\\nT:"),
        ("{text}\t|{ }:", "T\t|{ }:"),
    ],
)
def test_braces_tabs_and_backslashes_can_be_typed(template, prompt):
    assert Task("t", unescape_template(template), ("x", "y")).prompt("T") == prompt


@pytest.mark.parametrize("fields", [{"name": "\ud83d"}, {"template": "{text}\udcff:"}, {"labels": ("a", "\udcff")}])
def test_half_of_a_character_is_refused_in_every_field(fields):
    with pytest.raises(InputError, match="half of a surrogate pair"):
        Task(**{"name": "t", "template": "{text}:", "labels": ("x", "y")} | fields)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("Review:", "has no {text}"),
        ("{text} {text}:", "has {text} 2 times"),
        ("{text}\nLabel: ", "ends in whitespace"),
        ("{text}\nLabel:\n", "ends in whitespace"),
        (None, "must be a text"),
    ],
)
def test_a_template_that_cannot_work_is_refused(template, complaint):
    with pytest.raises(InputError, match=complaint):
        Task("t", template, ("x", "y"))


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        (("good", "good"), 'must differ, but "good"'),
        (("good",), "at least two labels"),
        (("good", ""), "empty"),
        (("good", "  "), "empty"),
        (("good", " bad"), "surrounding whitespace"),
        (("good", "b\nad"), "line break"),
        ((0, 1), "must be a text, not 0"),
        ("good", "must be a list"),
    ],
)
def test_labels_that_cannot_work_are_refused(labels, complaint):
    with pytest.raises(InputError, match=complaint):
        Task("t", "{text}:", labels)


@pytest.mark.parametrize("name", ["", " ", None])
def test_a_task_has_a_name(name):
    with pytest.raises(InputError, match="name of a task"):
        Task(name, "{text}:", ("x", "y"))


def test_a_task_without_labels_is_open_ended_and_its_prompt_is_the_text():
    task = Task("pairs")
    assert task.open_ended
    assert not TASK.open_ended
    assert task.demonstration(Example("2 + 2 =", "4")) == "2 + 2 =4\n"


def test_only_a_template_that_a_label_follows_may_not_end_in_a_blank():
    """A completion has no leading blank of its own."""
    with pytest.raises(InputError, match="ends in whitespace"):
        Task("t", "{text} is ", ("good", "bad"))
    assert Task("t", "{text} is ").demonstration(Example("7", "odd")) == "7 is odd\n"


def test_a_list_of_labels_becomes_a_tuple_so_that_tasks_can_be_compared_and_hashed():
    task = Task("sst2", TASK.template, ["negative", "positive"])
    assert task == TASK
    assert hash(task) == hash(TASK)


def test_tasks_and_examples_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TASK.name = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Example("a", "b").label = "c"


@pytest.mark.parametrize("task", [TASK, Task("pairs"), Task("ü", "«{text}»:", ("ja", "nein"))])
def test_a_task_survives_json(task):
    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_an_open_ended_task_may_leave_the_template_out_and_other_keys_are_ignored():
    assert Task.from_dict({"name": "pairs", "labels": [], "licence": "CC0"}) == Task("pairs")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"template": "{text}:", "labels": ["x", "y"]}, 'no "name"'),
        ({"name": "t", "template": "{text}:"}, 'no "labels"'),
        ({"name": "t", "labels": ["x", "y"]}, 'no "template"'),
        ({"name": "t", "template": "{text}:", "labels": {"x": 1, "y": 2}}, "must be a list"),
        ({"name": 3, "template": "{text}:", "labels": ["x", "y"]}, "name of a task"),
        (["t"], "must be a JSON object"),
    ],
)
def test_a_wrong_json_object_is_refused(values, complaint):
    with pytest.raises(InputError, match=complaint):
        Task.from_dict(values)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [(r"{text}\nLabel:", "{text}\nLabel:"), (r"a\tb", "a\tb"), ("a\nb", "a\nb"), (r"C:\dir", r"C:\dir")],
)
def test_escapes_typed_in_a_shell_are_undone(typed, meant):
    assert unescape_template(typed) == meant
