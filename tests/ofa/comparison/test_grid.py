"""Parsing a grid: lists, ranges, combinations of settings, and refusals in one sentence."""

from __future__ import annotations

import pytest
import yaml

from ofa.comparison.arguments import check_settings, inputs_for
from ofa.comparison.grid import Grid, checked_part
from ofa.errors import InputError
from ofa.methods import METHODS
from ofa.tasks import Example


def grid(**values):
    return checked_part(Grid, {"tasks": "a", "methods": "icl", "seeds": "1", **values})


def rows(methods):
    return [(row.method, row.settings) for row in grid(methods=methods).methods]


# Seeds and tasks


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("42-46", (42, 43, 44, 45, 46)),
        ("42,43", (42, 43)),
        ("7", (7,)),
        (" 1 - 3 , 9 ", (1, 2, 3, 9)),
        ("3,1-3", (3, 1, 2)),
        (5, (5,)),
        ([42, "44-45"], (42, 44, 45)),
    ],
)
def test_seeds_are_ranges_and_lists(written, expected):
    """In the order given, each once."""
    assert grid(seeds=written).seeds == expected


@pytest.mark.parametrize("written", ["42-", "-1", "46-42", "a", "1.5", "1-9999999", "42;43", [True], [[1]]])
def test_invalid_seeds_are_refused(written):
    with pytest.raises(InputError, match=r"the seeds .*42-46"):
        grid(seeds=written)


def test_a_list_of_tasks_may_hold_commas_and_a_text_is_split_at_them():
    assert grid(tasks="sst2, trec,sst2").tasks == ("sst2", "trec")
    assert grid(tasks=["data/a,b", "trec"]).tasks == ("data/a,b", "trec")


# Methods


def test_all_is_every_method_with_its_own_settings():
    assert rows("all") == [(name, {}) for name in METHODS]


def test_lists_of_settings_become_rows_of_every_combination():
    given = yaml.safe_load("{zero-shot: , ofa: {sharpness: [0.001, 0.01], step_ratio: [0.1, 1], epochs: 5}}")
    assert rows(given) == [
        ("zero-shot", {}),
        ("ofa", {"sharpness": 0.001, "step_ratio": 0.1, "epochs": 5}),
        ("ofa", {"sharpness": 0.001, "step_ratio": 1, "epochs": 5}),
        ("ofa", {"sharpness": 0.01, "step_ratio": 0.1, "epochs": 5}),
        ("ofa", {"sharpness": 0.01, "step_ratio": 1, "epochs": 5}),
    ]


def test_a_method_may_have_several_sets_of_settings():
    given = {"ofa": [None, {"sharpness": 0.0, "epochs": [5, 6]}]}
    assert rows(given) == [("ofa", {}), *(("ofa", {"sharpness": 0.0, "epochs": epochs}) for epochs in (5, 6))]


def test_a_list_of_methods_may_mix_names_and_settings():
    """A row that is named twice is one row."""
    given = yaml.safe_load("[icl, ofa, ofa: {sharpness: 0.5}, {ofa: , icl: }]")
    assert rows(given) == [("icl", {}), ("ofa", {}), ("ofa", {"sharpness": 0.5})]


def test_a_number_that_yaml_takes_for_a_text_is_a_number():
    """YAML 1.1 wants a point in 1e-3; a text would be another cell than the number, and no λ."""
    assert yaml.safe_load("1e-3") == "1e-3"
    given = yaml.safe_load("{ofa: {sharpness: [1e-3, 1.0e-3], epochs: '7', estimator: exact}}")
    assert rows(given) == [("ofa", {"sharpness": 0.001, "epochs": 7, "estimator": "exact"})]


# Refusals


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"methods": "norm_tuning"}, 'no method "norm_tuning", did you mean "norm-tuning"'),
        ({"methods": {"xyzzy": None}}, 'no method "xyzzy": use one of zero-shot'),
        ({"methods": {"ofa": [1, 2]}}, "among the settings of ofa is 1: write `name: value`"),
        ({"methods": {"ofa": {"sharpness": []}}}, "sharpness of ofa is an empty list"),
        ({"methods": []}, "the grid has no --methods: give"),
        ({"methods": " , "}, "the grid has no --methods: give"),
        ({"tasks": ","}, "the grid has no --tasks: give"),
        ({"tasks": None}, "--tasks is missing"),
        ({"seeds": []}, "the grid has no --seeds: give"),
        ({"shots": 0}, "--shots 0 cannot be used: input should be greater than or equal to 1"),
        ({"test_size": "many"}, "--test-size many cannot be used"),
        ({"dtype": "float8"}, "--dtype float8 cannot be used.*'bfloat16'"),
    ],
)
def test_invalid_grids_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        grid(**values)


# Settings and inputs of methods


def takes_all(model, tokenizer, task, shots, seed, *, pool=(), rank=8, validation=(), **settings): ...


def takes_one(model, tokenizer, task, shots, seed, *, layer=0, pool=()): ...


def takes_none(model, tokenizer, task, shots, seed): ...


@pytest.fixture(autouse=True)
def methods(register):
    register("takes-all", takes_all)
    register("takes-one", takes_one)
    register("takes-none", takes_none)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("takes-all", {"rank": 4, "epochs": 3, "estimator": "hutchinson"}),
        ("takes-one", {"layer": 3}),
        ("takes-none", {}),
        ("ofa", {"sharpness": 0.01}),
    ],
)
def test_settings_are_the_arguments_of_fit_and_of_training(name, settings):
    check_settings(name, settings)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("ofa", {"sharpnes": 0.1}, 'ofa has no setting "sharpnes", did you mean "sharpness"'),
        ("norm-tuning", {"sharpness": 1.0}, r"norm-tuning means sharpness=0\.0, not 1\.0"),
        ("ofa", {"epochs": 0}, "in the method ofa, epochs must be"),
        ("ofa", {"estimator": "guess"}, "in the method ofa, .*guess"),
        ("takes-all", {"pool": "x"}, 'no setting "pool"'),
        ("takes-all", {"seed": 3}, 'no setting "seed"'),
        ("takes-all", {"validation": "x"}, 'no setting "validation"'),
        ("takes-one", {"epochs": 3}, 'no setting "epochs": use one of layer'),
        ("takes-none", {"epochs": 3}, 'no setting "epochs": it has none'),
    ],
)
def test_settings_that_a_method_does_not_take_are_refused_before_anything_runs(name, settings, words):
    with pytest.raises(InputError, match=words):
        check_settings(name, settings)


def test_a_method_gets_the_inputs_that_its_signature_names():
    pool = (Example("a", "b"),)
    assert inputs_for("takes-all", pool) == inputs_for("takes-one", pool) == {"pool": pool}
    assert inputs_for("takes-none", pool) == inputs_for("zero-shot", pool) == {}
