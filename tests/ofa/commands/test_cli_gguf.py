"""`ofa merge --gguf`: the merged file predicts what the adapter predicts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ofa.command_line import TEMPLATE, TRAIN, done, ofa, write_rows

TEXTS = [text for text, _ in TRAIN]


@pytest.fixture(scope="module")
def adapter(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter tuned on the tiny GGUF file. Read only."""
    root = tmp_path_factory.mktemp("gguf")
    data = write_rows(root / "train.jsonl", TRAIN)
    fit = ("fit", "--model", tiny_gguf, "--data", data, "--template", TEMPLATE, "--shots", 2, "--epochs", 2)
    done(*fit, "--learning-rate", 0.1, "--out", root / "adapter")
    return root / "adapter"


@pytest.fixture
def tuned(adapter: Path, tiny_gguf: Path, tmp_path: Path) -> Path:
    done("merge", adapter, "--gguf", tiny_gguf, "--out", tmp_path / "tuned.gguf")
    return tmp_path / "tuned.gguf"


def test_a_merged_file_predicts_what_the_adapter_predicts(adapter: Path, tuned: Path, tmp_path: Path) -> None:
    test = write_rows(tmp_path / "test.jsonl", TRAIN)
    labels = ("--data", test, "--template", TEMPLATE, "--labels", "objective,subjective", "--json")
    merged = done("evaluate", "--model", tuned, *labels).json
    adapted = done("evaluate", adapter, "--data", test, "--json").json
    assert merged["negative_log_likelihood"] == pytest.approx(adapted["negative_log_likelihood"], rel=1e-6)


@pytest.mark.parametrize("option", [("--model", "embedded"), ("--dtype", "float16")], ids=["model", "dtype"])
def test_options_that_the_gguf_file_fixes_are_refused(adapter: Path, tiny_gguf: Path, tmp_path: Path, option) -> None:
    finished = ofa("merge", adapter, "--gguf", tiny_gguf, "--out", tmp_path / "tuned.gguf", *option)
    assert finished.status == 2
    assert "leave out --model and --dtype" in finished.err
    assert not (tmp_path / "tuned.gguf").exists()
