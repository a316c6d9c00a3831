"""Hub tasks when the hub is off, unreachable, silent or refuses: the cache is used, else one sentence, quickly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import datasets
import huggingface_hub
import pytest

from ofa.errors import InputError
from ofa.tasks import load_hub_dataset, load_hub_task
from tests.hub import running_hub
from tests.ofa.command_line import TEMPLATE, ofa
from tests.ofa.tasks.test_hub_tasks import parquet_split

# Reads both kinds of task from the hub, then from the caches: with offline=True, and without a connection.
READ_THRICE = """
import json, sys, time
import huggingface_hub
from ofa.tasks import load_task

def read(**options):
    started = time.perf_counter()
    examples = [[len(data.train), data.test[0].text] for data in (load_task(n, **options) for n in ("sst2", "emo"))]
    return examples, time.perf_counter() - started

found = {"first": read(), "offline": read(offline=True)}
huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"
found["dead line"] = read()
print(json.dumps(found))
"""
SECONDS = 15  # on a busy machine; the library's own six tries of a dead line sleep for 23


def process(*arguments: object, home, endpoint: str) -> subprocess.CompletedProcess[str]:
    hidden = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE", "HF_HUB_CACHE")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={
            **kept,
            "HF_HOME": str(home),
            "HF_ENDPOINT": endpoint,
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        },
    )


def serve_tasks(hub, folder) -> None:
    """SST-2 as JSON lines, EmoContext as converted parquet files: the two ways to read data sets."""
    rows = [{"text": f"t{n}", "label": n % 2, "label_text": ("negative", "positive")[n % 2]} for n in range(6)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    hub.add("datasets", "SetFit/sst2", {"train.jsonl": lines, "test.jsonl": lines})
    files = {}
    for split in ("train", "test"):
        parquet_split("emo", split).to_parquet(folder / "split.parquet")
        files[f"emo2019/{split}/0000.parquet"] = (folder / "split.parquet").read_bytes()
    hub.add("datasets", "SemEvalWorkshop/emo", files)


def test_what_was_read_once_is_read_again_without_the_hub(tmp_path):
    """The real client against a server; `datasets` cannot find emo's individually named files in its cache."""
    with running_hub() as hub:
        serve_tasks(hub, tmp_path)
        done = process("-c", READ_THRICE, home=tmp_path / "home", endpoint=hub.url)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    examples, _ = found["first"]
    assert examples == [[6, "t0"], [12, "test others 0"]]
    for way in ("offline", "dead line"):
        again, seconds = found[way]
        assert again == examples
        assert seconds < SECONDS


def test_offline_sends_no_request_and_fails_in_one_sentence(tmp_path):
    """The command as a process; the hub is running, so that any request would be counted."""
    with running_hub() as hub:
        serve_tasks(hub, tmp_path)
        arguments = ["-m", "ofa", "fit", "--data", "sst2", "--out", tmp_path / "out", "--offline"]
        done = process(*arguments, home=tmp_path / "home", endpoint=hub.url)
        assert hub.requests == []
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(
        'ofa: SetFit/sst2 (split "train") could not be loaded from the Hugging Face hub (offline mode'
    )
    assert not (tmp_path / "out").exists()


@pytest.fixture
def empty_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def no_questions(empty_caches, monkeypatch):
    """Empty caches, and a client that fails when used."""

    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", asked)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)


BY_NAME = ["--data", "sst2"]
BY_ID = ["--data", "someone/data", "--template", TEMPLATE]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fit", *BY_NAME, "--out"], "SetFit/sst2"),
        (["fit", *BY_ID, "--out"], "someone/data"),
        (["fit", "--data", "reviews", "--test", "mr", "--out"], "cornell-movie-review-data/rotten_tomatoes"),
        (["fit", "--data", "reviews", "--validation", "emo", "--out"], "SemEvalWorkshop/emo"),
        (["evaluate", *BY_NAME], "SetFit/sst2"),
        (["probe", *BY_NAME, "--out"], "SetFit/sst2"),
        (["compare", "--tasks", "reviews,trec", "--out"], "SetFit/TREC-QC"),
    ],
    ids=lambda value: " ".join(value[:-1]) if isinstance(value, list) else "",
)
def test_every_command_that_reads_tasks_stays_offline(arguments, named, no_questions, tmp_path):
    """`--offline` reaches everything that reads data, and writes no output."""
    out = [tmp_path / "out"] if arguments[-1] == "--out" else []
    refused = ofa(*arguments, *out, "--offline")
    assert refused.status == 2
    assert refused.err.startswith(f"ofa: {named}")
    assert "offline mode is on, and no copy of it is in the cache" in refused.err
    assert refused.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["sst2", "emo"])
def test_a_refused_connection_is_tried_once(name, empty_caches, monkeypatch):
    """`datasets` would retry six times; the sentence has the system's error and what to do."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.perf_counter()
    with pytest.raises(InputError, match=r"the hub cannot be reached: .*, and no copy of it is in the cache\): check"):
        load_hub_task(name)
    assert time.perf_counter() - started < SECONDS


def test_a_silent_hub_is_not_waited_for(empty_caches, monkeypatch):
    """A server that accepts and never answers, like some firewalls."""
    import socket

    monkeypatch.setattr("ofa.hub.TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(InputError, match="the hub cannot be reached"):
            load_hub_task("sst2")


def test_the_environment_may_say_offline_too(no_questions, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="offline mode is on"):
        load_hub_dataset("someone/data", template="{text}:")


def test_the_libraries_are_left_as_they_were(empty_caches):
    """Offline mode and quiet logging end with the read; other users of the library are not affected."""
    before = datasets.config.HF_HUB_OFFLINE, datasets.utils.logging.get_verbosity()
    with pytest.raises(InputError):
        load_hub_task("sst2", offline=True)
    assert (datasets.config.HF_HUB_OFFLINE, datasets.utils.logging.get_verbosity()) == before


@pytest.mark.parametrize(
    ("private", "words"),
    [(False, "there is no public data set SetFit/sst2 on the hub; check its name"), (True, "there is no public data")],
    ids=["no such data set", "a private one"],
)
def test_what_the_hub_does_not_give_is_refused_in_a_sentence(private, words, empty_caches, monkeypatch):
    with running_hub() as hub:
        if private:
            hub.add("datasets", "SetFit/sst2", {}, private=True)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        with pytest.raises(InputError, match=words) as refusal:
            load_hub_task("sst2")
    assert "\n" not in str(refusal.value)
