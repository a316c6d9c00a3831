"""Draws are stratified, fixed by the seed on every machine, and independent of the order of classes in a file."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from ofa.errors import InputError
from ofa.tasks import Example, class_balanced, few_shot

LABELS = ("red", "green", "blue")
EXAMPLES = [Example(f"{label} {number}", label) for number in range(20) for label in LABELS]


@pytest.mark.parametrize("shots", [1, 5, 20])
@pytest.mark.parametrize("seed", [0, 42, -1])
def test_every_class_gives_its_shots_without_replacement(shots, seed):
    drawn = few_shot(EXAMPLES, LABELS, shots, seed)
    assert Counter(example.label for example in drawn.examples) == dict.fromkeys(LABELS, shots)
    assert len(set(drawn.indices)) == len(drawn.indices)
    assert [EXAMPLES[index] for index in drawn.indices] == list(drawn.examples)


def test_the_draw_is_fixed_by_the_seed_for_good():
    """Golden indices: a change here would silently change every published result."""
    assert few_shot(EXAMPLES, LABELS, 2, 42).indices == (18, 33, 46, 34, 17, 32)
    assert few_shot(EXAMPLES, (), 4, 42).indices == (33, 54, 42, 55)


def test_seeds_differ_and_classes_are_mixed():
    draws = {few_shot(EXAMPLES, LABELS, 5, seed).indices for seed in range(42, 47)}
    assert len(draws) == 5
    labels = [example.label for example in few_shot(EXAMPLES, LABELS, 5, 42).examples]
    assert labels != sorted(labels)


def test_other_processes_draw_the_same():
    """The draw must not depend on the process's hash seed."""
    program = (
        "from ofa.tasks import Example, few_shot\n"
        "examples = [Example(f'{label} {n}', label) for n in range(20) for label in ('red', 'green', 'blue')]\n"
        "print(few_shot(examples, ('red', 'green', 'blue'), 5, 7).indices)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert outputs == {str(few_shot(EXAMPLES, LABELS, 5, 7).indices)}


def test_neither_the_order_of_labels_nor_the_interleaving_of_classes_changes_the_draw():
    grouped = sorted(EXAMPLES, key=lambda example: example.label)
    drawn = few_shot(EXAMPLES, LABELS, 5, 42).examples
    assert few_shot(EXAMPLES, LABELS[::-1], 5, 42).examples == drawn
    assert few_shot(grouped, LABELS, 5, 42).examples == drawn


def test_drawing_leaves_the_global_generator_alone():
    random.seed(3)
    expected = random.random()
    random.seed(3)
    few_shot(EXAMPLES, LABELS, 5, 42)
    assert random.random() == expected


def test_another_class_does_not_change_what_a_class_draws():
    with_blue = {e for e in few_shot(EXAMPLES, LABELS, 3, 42).examples if e.label != "blue"}
    assert set(few_shot(EXAMPLES, ("red", "green"), 3, 42).examples) == with_blue


def test_more_shots_contain_the_fewer():
    fewer, more = (set(few_shot(EXAMPLES, LABELS, shots, 42).indices) for shots in (2, 5))
    assert fewer < more


def test_a_class_that_is_too_small_is_named_with_both_numbers():
    examples = [*EXAMPLES, Example("one", "black")]
    with pytest.raises(InputError, match='class "black" has 1 training example but 5 shots'):
        few_shot(examples, (*LABELS, "black"), 5, 42)
    with pytest.raises(InputError, match='class "white" has 0'):
        few_shot(examples, (*LABELS, "white"), 5, 42)
    with pytest.raises(InputError, match="the task has 61 training examples but 62 shots"):
        few_shot(examples, (), 62, 42)


@pytest.mark.parametrize("count", [0, -1])
def test_drawing_less_than_one_is_refused(count):
    with pytest.raises(InputError, match="at least 1"):
        few_shot(EXAMPLES, LABELS, count, 42)
    with pytest.raises(InputError, match="at least 1"):
        class_balanced(EXAMPLES, LABELS, count, 42)


def uneven(**sizes):
    return [Example(f"{label} {number}", label) for label, size in sizes.items() for number in range(size)]


@pytest.mark.parametrize(
    ("sizes", "size", "expected"),
    [
        ({"red": 50, "green": 50, "blue": 50}, 30, {"red": 10, "green": 10, "blue": 10}),
        ({"red": 50, "green": 50, "blue": 50}, 31, {"red": 10, "green": 10, "blue": 11}),
        ({"red": 4, "green": 50, "blue": 50}, 30, {"red": 4, "green": 13, "blue": 13}),
        ({"red": 4, "green": 5, "blue": 6}, 15, {"red": 4, "green": 5, "blue": 6}),
        ({"red": 4, "green": 5, "blue": 6}, 500, {"red": 4, "green": 5, "blue": 6}),
        ({"red": 4, "green": 5}, 8, {"red": 4, "green": 4}),
    ],
)
def test_the_test_subset_is_as_balanced_as_the_data_allow(sizes, size, expected):
    chosen = class_balanced(uneven(**sizes), LABELS, size, 42)
    assert Counter(example.label for example in chosen) == expected
    assert len(set(chosen)) == len(chosen)


def test_the_test_subset_is_shuffled_and_fixed_by_the_seed():
    first, again, other = (class_balanced(EXAMPLES, LABELS, 30, seed) for seed in (42, 42, 43))
    assert first == again != other
    labels = [example.label for example in first]
    assert any(set(labels[start : start + 3]) != set(LABELS) for start in range(0, 30, 3)), "still one of each in turn"
    assert len(class_balanced(EXAMPLES, (), 7, 42)) == 7
