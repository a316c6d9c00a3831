"""The embedded tasks have enough examples, no duplicates, and no shortcut to the label."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from ofa.errors import InputError
from ofa.tasks import DEMO_TASKS, load_demo_task

every_demo_task = pytest.mark.parametrize("name", DEMO_TASKS)


def normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


@every_demo_task
def test_the_folder_is_the_task_it_is_named_after(name):
    assert load_demo_task(name).task.name == name


@every_demo_task
def test_every_class_has_at_least_30_training_and_100_test_examples(name):
    data = load_demo_task(name)
    for examples, least in ((data.train, 30), (data.test, 100)):
        counts = Counter(example.label for example in examples)
        assert {label for label in data.task.labels if counts[label] < least} == set()


@every_demo_task
def test_no_text_occurs_twice_within_or_between_the_splits(name):
    data = load_demo_task(name)
    counts = Counter(normalised(example.text) for example in (*data.train, *data.test))
    assert [text for text, count in counts.items() if count > 1] == []


@every_demo_task
def test_no_label_word_stands_in_a_text(name):
    data = load_demo_task(name)
    words = re.compile(rf"\b({'|'.join(re.escape(normalised(label)) for label in data.task.labels)})\b")
    assert [e.text for e in (*data.train, *data.test) if words.search(normalised(e.text))] == []


@every_demo_task
def test_no_opening_trigram_covers_more_than_a_twentieth_of_a_class(name):
    data = load_demo_task(name)
    examples = (*data.train, *data.test)
    sizes = Counter(example.label for example in examples)
    openings = Counter((example.label, " ".join(normalised(example.text).split()[:3])) for example in examples)
    assert {opening: n for opening, n in openings.items() if n > 0.05 * sizes[opening[0]]} == {}


def test_an_unknown_demo_task_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match='did you mean "reviews"'):
        load_demo_task("review")
