"""Habits of command lines: --version, --quiet, completion, other names of options, progress."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ofa as ofa_package
from ofa import __version__
from ofa.commands import console
from tests.ofa.command_line import TEMPLATE, TRAIN, done, ofa, write_rows


def test_the_version():
    assert done("--version").out == f"ofa-adapt {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "--lr", "1e-3"], "no such option: --lr (did you mean --learning-rate?)"),
        (["fit", "--learning_rate", "1e-3"], "no such option: --learning_rate (did you mean --learning-rate?)"),
        (["fit", "--epoch", "3"], "no such option: --epoch (did you mean --epochs?)"),
        (["fit", "-o", "adapter"], "no such option: -o (did you mean --out?)"),
        (["evaluate", "--lr", "1e-3"], "no such option: --lr;"),
    ],
)
def test_options_by_the_names_of_other_programs(arguments, words):
    """The message suggests our name of the option, if the command has it."""
    finished = ofa(*arguments)
    assert finished.status == 2
    assert words in finished.err
    assert finished.err.count("\n") == 1


def test_completion(monkeypatch):
    """The request that the shell sends at every press of Tab after `--install-completion`."""
    monkeypatch.setenv("_OFA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "ofa fit --learn")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert ofa().out.split() == ["--learning-rate"]


def test_quiet_leaves_results_and_warnings(tiny_folder, tmp_path, monkeypatch):
    """Notices and progress are off, warnings of cut texts stay, and the next command is not quiet."""
    train = write_rows(tmp_path / "train.jsonl", [(text + " and slow" * 300, label) for text, label in TRAIN])
    fit = ["fit", "--data", train, "--template", TEMPLATE, "--model", tiny_folder, "--shots", 1, "--epochs", 1]
    monkeypatch.setattr(console, "_LINE_EVERY", 0.0)
    assert "adapter: " in done(*fit, "--out", tmp_path / "told").err
    quiet = done(*fit, "--out", tmp_path / "quiet", "--quiet")
    assert "were cut" in quiet.err
    assert "adapter: " not in quiet.err
    assert "training: " not in quiet.err
    assert quiet.out.startswith("accuracy ")
    predict = ["predict", tmp_path / "quiet", "--text", "a film"]
    assert done(*predict, "-q").out == done(*predict).out != ""


def test_a_long_run_without_a_terminal_prints_progress_lines(monkeypatch):
    """In a log: progress and remaining time, at the speed since the first update (a resumed run starts at 100)."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with contextlib.redirect_stderr(io.StringIO()) as told, console.progress_bar("training") as update:
        for step in range(100, 701):
            now[0] += 1
            update(step, 1000, "loss 0.5")
    lines = told.getvalue().splitlines()
    assert len(lines) == 20
    assert lines[0] == "ofa: training: 129 of 1,000, loss 0.5, about 15 min left"
    assert lines[-1] == "ofa: training: 699 of 1,000, loss 0.5, about 5 min left"


def test_a_short_run_prints_no_progress():
    with contextlib.redirect_stderr(io.StringIO()) as told, console.progress_bar("training") as update:
        for step in range(10):
            update(step, 10, "")
    assert told.getvalue() == ""


REFUSED = (
    ("fit", "--data", "nowhere.jsonl", "--out", "out"),
    ("fit", "--data", "tickets", "--model", "./nowhere", "--out", "out"),
    ("fit", "--data", "rows.csv", "--template", "no slot", "--out", "out"),
    ("fit", "--data", "rows.csv", "--template", "{nothing}:", "--out", "out"),
    ("fit", "--data", "rows.csv", "--template", "{text}:", "--label-column", "nothing", "--out", "out"),
    ("fit", "--data", "rows.csv", "--template", "{text}:", "--shots", "1", "--out", "rows.csv"),
    ("evaluate", "nowhere", "--data", "tickets"),
    ("evaluate", "adapter", "--data", "nowhere.csv"),
    ("evaluate", "adapter", "--data", "rows.csv", "--text-column", "nothing"),
    ("predict", "nowhere", "--text", "a film"),
    ("predict", "adapter", "--data", "nowhere.csv"),
    ("probe", "nowhere", "--data", "tickets", "--out", "out"),
    ("probe", "adapter", "--data", "nowhere.csv", "--out", "out"),
    ("merge", "nowhere", "--out", "out"),
    ("merge", "adapter", "--model", "./nowhere", "--out", "out"),
    ("compare", "--tasks", "nowhere", "--out", "out"),
    ("compare", "--tasks", "tickets", "--model", "./nowhere", "--out", "out"),
    ("report", "nowhere"),
    ("inspect", "./nowhere"),
    ("demo", "--task", "nothing"),
)

WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = sys.modules["transformers"] = None
from ofa import cli
for line in sys.stdin:
    sys.argv = ["ofa", *json.loads(line)]
    try:
        cli.main()
        status = 0
    except SystemExit as leave:
        status = leave.code
    print(status, flush=True)
    print("---", file=sys.stderr, flush=True)
"""


def test_wrong_paths_columns_and_templates_are_refused_before_torch_is_imported(tmp_path):
    """Importing torch takes seconds; none of these checks needs it."""
    (tmp_path / "rows.csv").write_text("text,label\na film,good\nanother,bad\n")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LN_TUNING"}')
    task = {"name": "rows", "template": "{text}:", "labels": ["good", "bad"]}
    (tmp_path / "adapter" / "ofa_config.json").write_text(json.dumps({"task": task}))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input="".join(json.dumps(arguments) + "\n" for arguments in REFUSED),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(ofa_package.__file__).parents[1]), *sys.path])},
    )
    told = [lines.strip() for lines in done.stderr.split("---\n")[:-1]]
    assert done.stdout.split() == ["2"] * len(REFUSED), done.stderr
    for arguments, line in zip(REFUSED, told, strict=True):
        assert line.startswith("ofa: "), (arguments, line)
        assert "\n" not in line
        assert "unexpected" not in line, (arguments, line)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "rows.csv"]
