"""That one function finds a task by name or path, and that importing the package stays light."""

from __future__ import annotations

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
    """Loaders that only say what they were asked for."""
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


def test_a_name_wins_over_a_folder_unless_the_path_says_so(folder, stubbed, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert load_task("sst2") is EMPTY
    assert load_task("./sst2").task.name == "mine"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("sst", 'did you mean "sst'),
        ("Reviews", 'did you mean "reviews"'),
        ("xyzzy", "use one of these names or the path of a folder"),
        (".", "task.json does not exist"),
    ],
)
def test_anything_else_is_refused_with_what_there_is(name, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=complaint):
        load_task(name)


def test_a_file_is_refused_with_the_advice_to_give_its_folder(folder):
    with pytest.raises(InputError, match="is a file: give its folder"):
        load_task(folder / "train.jsonl")


def test_importing_the_package_brings_in_no_heavy_library():
    """`ofa --help` must answer at once; whatever `ofa` itself imports is not the tasks' doing."""
    program = (
        "import sys, ofa; before = set(sys.modules); import ofa.tasks\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & (set(sys.modules) - before)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.strip() == "[]"
