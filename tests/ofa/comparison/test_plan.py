"""The same shots and test examples for every method, and refusals before anything runs."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ofa.comparison.plan import check_window
from ofa.comparison.records import Record
from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder
from ofa.models.introspection import model_window
from ofa.models.load import load_model, load_tokenizer
from ofa.tasks import few_shot, load_task
from tests.ofa.comparison.conftest import write_task


def test_every_task_meets_every_row_and_every_seed_once(make_plan, tasks):
    methods = {"zero-shot": None, "ofa": {"sharpness": [0.001, 0.01]}}
    plan = make_plan(tasks=[tasks["mood"], tasks["kind"]], methods=methods, seeds="3-4")
    assert [(cell.task, cell.row, cell.seed) for cell in plan.cells] == [
        (task, row, seed)
        for task in ("mood", "kind")
        for row in ("zero-shot", "ofa (sharpness=0.001)", "ofa (sharpness=0.01)")
        for seed in (3, 4)
    ]
    assert len({cell.key for cell in plan.cells}) == 12
    assert {cell.settings.get("sharpness") for cell in plan.cells} == {None, 0.001, 0.01}


def test_all_methods_of_a_seed_get_the_same_shots_and_all_cells_the_same_test_examples(make_plan, tasks):
    """The shots are those of `few_shot`, the test examples balanced over the classes."""
    plan = make_plan(methods="zero-shot,icl,ofa", seeds="1-3", shots=2, test_size=4)
    jobs = [plan.job(cell) for cell in plan.cells]
    data = load_task(tasks["mood"])
    for job in jobs:
        assert job.shots == few_shot(data.train, data.task.labels, 2, job.cell.seed)
        assert job.tested == jobs[0].tested
    assert len({job.shots for job in jobs}) == 3
    assert Counter(example.label for example in jobs[0].tested) == {"negative": 2, "positive": 2}


def test_a_method_that_asks_for_the_training_split_gets_it(make_plan, tasks, register):
    def fit(model, tokenizer, task, shots, seed, *, pool): ...

    register("asks", fit)
    plan = make_plan(tasks=[tasks["mood"], tasks["kind"]], methods="asks,icl", seeds="1-2")
    by_cell = {(cell.task, cell.method, cell.seed): plan.job(cell) for cell in plan.cells}
    assert by_cell["mood", "asks", 2].inputs == {"pool": load_task(tasks["mood"]).train}
    assert by_cell["kind", "icl", 2].inputs == {}


@pytest.mark.parametrize("changed", ["task.json", "train.jsonl", "test.jsonl"])
def test_a_cell_knows_its_task_by_all_of_its_files(make_plan, tmp_path, changed):
    """Another template, training or test example makes another cell, which is not mixed with old results."""
    folder = write_task(tmp_path / "mood", "mood")
    before = make_plan(tasks=[str(folder)])
    records = [Record(cell) for cell in before.cells]
    make_plan(tasks=[str(folder)]).check_against(records)
    file = folder / changed
    file.write_text(file.read_text().replace("Review", "Text").replace("warm", "cold"))
    after = make_plan(tasks=[str(folder)])
    assert {cell.key for cell in before.cells}.isdisjoint(cell.key for cell in after.cells)
    with pytest.raises(InputError, match='another task "mood": its files have changed'):
        after.check_against(records)


def test_cells_without_a_record_are_missing(make_plan):
    plan = make_plan(methods="zero-shot,icl,ofa", seeds="1-2")
    first, second, *others = plan.cells
    records = [Record(first), Record(second, error="it broke")]
    assert plan.missing(records) == tuple(others)
    assert plan.missing(records, retry_failed=True) == (second, *others)
    assert plan.missing([Record(cell) for cell in plan.cells], retry_failed=True) == ()


# Refusals


def without(folder: Path, **values) -> None:
    """Change the task.json of a folder."""
    task = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps({**task, **values}))


def test_a_file_of_a_task_stands_for_its_folder(make_plan, tasks):
    plan = make_plan(tasks=[f"{tasks['mood']}/train.jsonl"])
    assert plan.cells == make_plan().cells


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tasks": "sst22"}, 'no task or folder "sst22".*did you mean "sst2"'),
        ({"shots": 9}, 'in the task "mood", the class "negative" has 8 training examples but 9 shots'),
        ({"methods": {"ofa": {"sharpnes": 1}}}, 'no setting "sharpnes"'),
    ],
)
def test_grids_that_do_not_fit_their_tasks_are_refused(make_plan, values, words):
    with pytest.raises(InputError, match=words):
        make_plan(**values)


def test_two_tasks_of_one_name_are_refused(make_plan, tasks, tmp_path):
    other = write_task(tmp_path / "other", "mood", train=5)
    with pytest.raises(InputError, match='two tasks of the grid are called "mood"'):
        make_plan(tasks=[tasks["mood"], str(other)])


def test_a_task_without_test_examples_or_labels_is_refused(make_plan, tmp_path):
    folder = write_task(tmp_path / "mood", "mood")
    (folder / "test.jsonl").unlink()
    with pytest.raises(InputError, match=r'"mood" has no test examples: add test.jsonl'):
        make_plan(tasks=[str(folder)])
    without(folder, labels=[])
    (folder / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(InputError, match='"mood" has no labels to choose from'):
        make_plan(tasks=[str(folder)])


@pytest.mark.parametrize("shots", [1, 2, 3, 4, 5])
def test_the_window_is_refused_exactly_where_demonstrations_would_be_dropped(
    make_plan, tasks, tiny_folder, caplog, shots
):
    """Oracle: the encoder, which drops demonstrations with a warning; at every window around the limit."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    plan = make_plan(tasks=[tasks["kind"]], shots=shots, test_size=6, seeds="1-2")
    task = plan.tasks["kind"]
    whole = Encoder(tokenizer, task.task, None)
    limit = max(len(whole.encode_demonstrations(drawn.examples)) for drawn in task.drawn.values())
    limit += max(len(whole.encode_prompt(example.text)) for example in task.tested)
    limit += max(map(len, whole.labels.values()))
    for window in (limit - 30, *range(limit - 3, limit + 3)):
        caplog.clear()
        for drawn in task.drawn.values():
            texts = [example.text for example in task.tested]
            Encoder(tokenizer, task.task, window).encode_demonstrations(drawn.examples, texts=texts)
        if any(record.levelno >= logging.WARNING for record in caplog.records):
            with pytest.raises(InputError, match=rf"seed \d take .* window is {window}.*leave out the context"):
                check_window(plan.tasks, tokenizer, window, plan.grid)
        else:
            check_window(plan.tasks, tokenizer, window, plan.grid)
    check_window(plan.tasks, tokenizer, None, plan.grid)
    alone = plan.grid.model_copy(update={"contexts": ("prompt",)})
    check_window(plan.tasks, tokenizer, limit - 30, alone)


def test_a_model_is_known_before_its_weights_are_read(tiny_folder):
    """With the same name, window and tokens as the loaded model."""
    known, loaded = load_tokenizer(str(tiny_folder)), load_model(str(tiny_folder))
    assert model_window(known) == model_window(loaded.model) == 256
    assert (known.name, known.tokenizer.padding_side) == (loaded.name, "right")
    assert known.tokenizer("a text")["input_ids"] == loaded.tokenizer("a text")["input_ids"]
