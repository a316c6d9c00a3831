"""`load_task` finds a task by name or path, and importing the package stays fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import ofa.tasks
from ofa.errors import InputError
from ofa.tasks import DEMO_TASKS, HUB_TASKS, Example, Task, TaskData, load_task

EMPTY = TaskData(Task("stub"), ())


@pytest.fixture
def stubbed(monkeypatch):
    """Loaders that only record their arguments."""
    asked = []
    for loader in ("load_demo_task", "load_hub_task"):
        monkeypatch.setattr(ofa.tasks, loader, lambda name, kind=loader, **_: asked.append((kind, name)) or EMPTY)
    return asked


@pytest.mark.parametrize("name", DEMO_TASKS)
def test_demo_names_are_read_from_the_package(stubbed, name):
    assert load_task(name) is EMPTY
    assert stubbed == [("load_demo_task", name)]


@pytest.mark.parametrize("name", ["sst2", "sst5", "trec", "agnews", "subj", "hatespeech18", "dbpedia", "emo", "mr"])
def test_the_nine_names_of_the_paper_are_read_from_the_hub(stubbed, name):
    assert len(HUB_TASKS) == 9
    assert load_task(name) is EMPTY
    assert stubbed == [("load_hub_task", name)]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "sst2"
    folder.mkdir()
    (folder / "task.json").write_text('{"name": "mine", "template": "{text}:", "labels": ["x", "y"]}')
    (folder / "train.jsonl").write_text('{"text": "a", "label": "x"}\n')
    return folder


def test_a_folder_is_read_by_path(folder):
    for path in (folder, str(folder)):
        assert load_task(path).train == (Example("a", "x"),)


def test_a_task_folder_wins_over_a_task_of_its_name_and_both_are_named(folder, stubbed, monkeypatch, caplog):
    monkeypatch.chdir(folder.parent)
    assert load_task("sst2").task.name == "mine"
    assert f"sst2 is the folder {folder}, not the task of the paper" in caplog.text
    assert load_task("./sst2").task.name == "mine"
    (folder / "task.json").unlink()
    assert load_task("sst2") is EMPTY
    assert f"sst2 is the task of the paper, not the folder {folder}, which has no task.json" in caplog.text


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("sst", 'did you mean "sst'),
        ("Reviews", 'did you mean "reviews"'),
        ("xyzzy", "use one of these names, a path, or a hub id with a template"),
        (".", "task.json does not exist"),
    ],
)
def test_anything_else_is_refused_with_the_known_tasks(name, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=complaint):
        load_task(name)


def test_a_file_is_a_task_with_a_template_and_pairs_without(folder, monkeypatch):
    (folder / "train.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    monkeypatch.setenv("HOME", str(folder))
    data = load_task("~/train.jsonl", template="{text}:")
    assert data == TaskData(Task("train", "{text}:", ("x", "y")), (Example("a", "x"), Example("b", "y")))
    with pytest.raises(InputError, match=r'no column "prompt".*for labelled texts give --template'):
        load_task(folder / "train.jsonl")
    with pytest.raises(InputError, match="brings its own template"):
        load_task(folder, template="{text}:")


def test_columns_of_a_folder_are_those_of_its_task_unless_others_are_given(folder):
    (folder / "train.jsonl").write_text('{"review": "a", "text": "b", "stars": "x", "label": "y"}\n')
    task = {
        "name": "mine",
        "template": "{text}:",
        "labels": ["x", "y"],
        "text_column": "review",
        "label_column": "stars",
    }
    (folder / "task.json").write_text(json.dumps(task))
    assert load_task(folder).train == (Example("a", "x"),)
    assert load_task(folder, text_column="text", label_column="label").train == (Example("b", "y"),)


def test_importing_the_package_brings_in_no_heavy_library():
    """`ofa --help` must be fast; modules that `ofa` itself imports do not count."""
    program = (
        "import sys, ofa; before = set(sys.modules); import ofa.tasks\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & (set(sys.modules) - before)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.strip() == "[]"
