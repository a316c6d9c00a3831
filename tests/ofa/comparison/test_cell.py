"""A cell's record has the results of method and evaluation, and a failure affects no other cell."""

from __future__ import annotations

import logging

import pytest
import torch

from ofa.comparison.cell import CellRunner
from ofa.comparison.records import Record
from ofa.errors import InputError
from ofa.evaluation.scorer import Scorer, evaluate
from ofa.methods import Predictor, method
from ofa.models.load import LoadedModel
from tests.device import DEVICE
from tests.ofa.comparison.conftest import QUICK

logger = logging.getLogger("ofa.methods.test")
NAME = torch.cuda.get_device_name(DEVICE) if DEVICE == "cuda" else DEVICE


@pytest.fixture
def runner(tiny_model):
    return CellRunner(LoadedModel(*tiny_model, "a-model", "folder", None))


def run(runner, plan):
    """The outcome of the only cell of a plan."""
    (cell,) = plan.cells
    return runner.run(plan.job(cell))


@pytest.mark.parametrize(
    ("name", "settings", "contexts"),
    [
        ("zero-shot", {}, ["prompt"]),
        ("icl", {}, ["demonstrations"]),
        ("norm-tuning", QUICK, ["prompt", "demonstrations"]),
    ],
)
def test_a_record_is_what_fit_and_evaluate_say(runner, tiny_model, make_plan, name, settings, contexts):
    """Oracle: predictions, metrics and sizes by hand; the record survives a round trip through its line."""
    model, tokenizer = tiny_model
    plan = make_plan(methods={name: settings}, seeds="3")
    (cell,) = plan.cells
    job = plan.job(cell)
    record = runner.run(job).record
    shots = job.shots.examples
    with method(name)(model, tokenizer, job.task, shots, 3, **settings) as predictor:
        for context in contexts:
            shown = shots if context == "demonstrations" else ()
            expected = evaluate(model, tokenizer, job.task, job.tested, demonstrations=shown)
            score = record.scores[context]
            assert score.metrics == expected.metrics.to_dict()
            assert [job.task.labels[index] for index in score.predictions] == list(expected.predictions)
            assert [job.task.labels[index] for index in score.truth] == [example.label for example in job.tested]
            assert score.seconds_per_text > 0
        assert record.trainable_parameters == predictor.trainable_parameters
        assert record.stored_bytes == predictor.stored_bytes
    assert list(record.scores) == contexts
    assert (record.cell, record.error, record.done) == (cell, None, True)
    assert record.shots_sha256 == job.shots.sha256
    assert 0 < record.fit_seconds < record.seconds
    # A process with PyTorch in it; of a GPU, what the cell has allocated there.
    assert record.peak_memory_bytes > (10**8 if DEVICE == "cpu" else 0)
    assert {"torch", "transformers", "python", "ofa-adapt", "weights"} <= record.versions.keys()
    assert {name: record.versions[name] for name in ("device", "dtype")} == {"device": NAME, "dtype": "float32"}
    assert Record.from_line(record.to_line(), "here") == record


@pytest.mark.parametrize(
    ("name", "contexts", "tested"),
    [
        ("norm-tuning", "prompt", ["prompt"]),
        ("norm-tuning", "demonstrations,prompt", ["prompt", "demonstrations"]),
        ("icl", "prompt", ["demonstrations"]),  # it has no other
    ],
)
def test_only_the_contexts_of_the_grid_are_tested(runner, make_plan, name, contexts, tested):
    """A grid with a context that was left out runs the cell again, if the method supports it."""
    settings = QUICK if name == "norm-tuning" else {}
    plan = make_plan(methods={name: settings}, contexts=contexts)
    record = run(runner, plan).record
    assert list(record.scores) == tested
    assert plan.missing([record]) == ()
    both = make_plan(methods={name: settings})
    assert both.missing([record]) == (both.cells if (name, contexts) == ("norm-tuning", "prompt") else ())


def test_extra_tokens_are_those_of_the_demonstrations(runner, tiny_model, make_plan):
    """By the tokenizer, which puts nothing in front; a bare prompt has none."""
    plan = make_plan(methods={"norm-tuning": QUICK})
    (cell,) = plan.cells
    job = plan.job(cell)
    block = "".join(job.task.demonstration(shot) for shot in job.shots.examples)
    scores = runner.run(job).record.scores
    assert scores["demonstrations"].extra_tokens == len(tiny_model[1](block)["input_ids"])
    assert scores["prompt"].extra_tokens == 0


def test_a_method_keeps_its_own_demonstrations(runner, make_plan, register):
    """In the context "prompt", the method's scorer decides what precedes a text."""

    def fit(model, tokenizer, task, shots, seed):
        scorer = Scorer(model, tokenizer, task, demonstrations=shots)
        return Predictor(scorer, contexts=("prompt",), notes={"extra_tokens": 7})

    register("own-way", fit)
    own = run(runner, make_plan(methods="own-way", test_size=12)).record.scores["prompt"]
    shown = run(runner, make_plan(methods="icl", test_size=12)).record.scores["demonstrations"]
    assert own.metrics == shown.metrics
    assert own.extra_tokens == 7


def test_settings_and_inputs_reach_the_method(runner, make_plan, register):
    given = {}

    def fit(model, tokenizer, task, shots, seed, *, rank, pool, **settings):
        given.update(rank=rank, pool=pool, seed=seed, shots=shots, **settings)
        return method("zero-shot")(model, tokenizer, task, shots, seed)

    register("asks", fit)
    plan = make_plan(methods={"asks": {"rank": 3, "epochs": 2}}, seeds="9")
    assert run(runner, plan).record.done
    job = plan.job(plan.cells[0])
    assert given == {"rank": 3, "epochs": 2, "seed": 9, "pool": job.inputs["pool"], "shots": job.shots.examples}


# Failures


def failing(error):
    def fit(model, tokenizer, task, shots, seed):
        raise error

    return fit


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("there is no room: make some"), "there is no room: make some"),
        (RuntimeError("out of memory\nand more"), "RuntimeError: out of memory"),
        (KeyError("x"), "KeyError: 'x'"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_cell_that_fails_is_recorded_with_its_error_and_the_next_one_runs(runner, make_plan, register, error, words):
    register("fails", failing(error))
    outcome = run(runner, make_plan(methods="fails"))
    assert outcome.intact
    assert (outcome.record.error, outcome.record.done, outcome.record.scores) == (words, False, {})
    assert outcome.record.versions["device"] == NAME
    assert Record.from_line(outcome.record.to_line(), "here") == outcome.record
    assert run(runner, make_plan()).record.done


def test_a_training_that_diverges_is_a_failed_cell(runner, make_plan):
    outcome = run(runner, make_plan(methods={"norm-tuning": {"learning_rate": 1e30, "epochs": 2}}))
    assert outcome.intact
    assert "try a lower learning rate" in outcome.record.error


def leaves(change):
    def fit(model, tokenizer, task, shots, seed):
        change(model)
        return Predictor(Scorer(model, tokenizer, task), contexts=("prompt",))

    return fit


def test_a_method_that_leaves_something_behind_fails_loudly(runner, make_plan, register):
    """Its numbers are not kept, and the model must not be used for another cell."""
    register("leaves", leaves(lambda model: model.model.norm.weight.data.mul_(1.01)))
    outcome = run(runner, make_plan(methods="leaves"))
    assert not outcome.intact
    assert outcome.record.error == "the method did not restore the model: tensor 'model.norm.weight'"
    assert outcome.record.scores == {}


def test_a_model_that_fails_afterwards_is_not_used_again(runner, make_plan, register):
    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: device-side assert triggered")

    register("breaks", leaves(lambda model: setattr(model, "forward", broken)))
    outcome = run(runner, make_plan(methods="breaks"))
    assert not outcome.intact
    assert "device-side assert" in outcome.record.error


def test_our_warnings_are_in_the_record_and_not_printed(runner, make_plan, register, capsys):
    """Once each; the logger is restored afterwards."""

    def fit(model, tokenizer, task, shots, seed):
        for _ in range(2):
            logger.warning("3 of %d demonstrations were dropped", 10)
        return method("zero-shot")(model, tokenizer, task, shots, seed)

    register("warns", fit)
    before = list(logging.getLogger("ofa").handlers)
    record = run(runner, make_plan(methods="warns")).record
    assert record.notes["warnings"] == ["3 of 10 demonstrations were dropped"]
    assert capsys.readouterr().err == ""
    assert logging.getLogger("ofa").handlers == before


def test_texts_that_lost_their_beginning_are_counted(runner, make_plan, tmp_path):
    from tests.ofa.comparison.conftest import write_task

    folder = write_task(tmp_path / "mood", "mood")
    file = folder / "test.jsonl"
    file.write_text(file.read_text().replace("test warm", "test " + "very " * 300 + "warm"))
    record = run(runner, make_plan(tasks=[str(folder)], test_size=12)).record
    assert record.notes == {"truncated_texts": 2}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: what a GPU says of its memory")
def test_peak_memory_of_a_gpu_is_that_of_the_cell(tiny_folder, make_plan):
    from ofa.models.load import load_model

    runner = CellRunner(load_model(str(tiny_folder), device="cuda"))
    torch.empty(2**28, dtype=torch.uint8, device="cuda")
    record = run(runner, make_plan()).record
    assert 0 < record.peak_memory_bytes < 2**28
