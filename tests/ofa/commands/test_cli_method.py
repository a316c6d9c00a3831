"""`ofa fit --method`: adapters of PEFT's other methods, which the other commands open again."""

from __future__ import annotations

import json

import pytest

from tests.ofa.command_line import FIT_FILES, LABELS, TEMPLATE, TEST, TRAIN, done, names, ofa, write_rows


@pytest.fixture
def arguments(tiny_folder, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", TRAIN)
    where = ["--data", train, "--template", TEMPLATE, "--labels", LABELS, "--model", tiny_folder]
    return ["fit", *where, "--shots", 2, "--batch-size", 2, "--out", tmp_path / "adapter"]


def settings(tmp_path):
    return json.loads((tmp_path / "adapter" / "ofa_config.json").read_text(encoding="utf-8"))["settings"]


def test_a_lora_adapter_goes_through_the_commands(arguments, tmp_path, tiny_folder):
    """Fit, evaluate, predict and merge; the merged checkpoint predicts the same."""
    summary = done(*arguments, "--method", "lora", "--set", "rank=2", "--max-steps", 2, "--json").json
    folder, test = tmp_path / "adapter", write_rows(tmp_path / "test.jsonl", TEST)
    assert summary["method"] == "lora"
    assert names(folder) == FIT_FILES
    assert json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 2
    evaluated = done("evaluate", folder, "--data", test, "--json").json
    assert evaluated["count"] == len(TEST)
    predicted = done("predict", folder, "--text", TEST[0][0], "--json").json[0]["probabilities"]
    done("merge", folder, "--out", tmp_path / "merged", "--quiet")
    done(*arguments[:-1], tmp_path / "unmoved", "--learning-rate", 1e-30, "--calibrate", "none", "--quiet")
    merged = done("predict", tmp_path / "unmoved", "--model", tmp_path / "merged", "--text", TEST[0][0], "--json")
    assert merged.json[0]["probabilities"] == pytest.approx(predicted, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "rate"), [((), 3e-3), (("--learning-rate", 1e-3), 1e-3)], ids=["the method's own", "norm tuning's"]
)
def test_only_settings_that_were_typed_replace_the_methods_own(arguments, tmp_path, options, rate):
    """Also one that is typed as the default of norm tuning."""
    done(*arguments, "--method", "ia3", "--max-steps", 1, *options, "--quiet")
    assert settings(tmp_path)["learning_rate"] == rate


def test_a_file_of_options_counts_as_typed(arguments, tmp_path):
    (tmp_path / "fit.yaml").write_text("method: ia3\nlearning_rate: 0.001\nmax_steps: 1\n", encoding="utf-8")
    done(*arguments, "--config", tmp_path / "fit.yaml", "--quiet")
    assert settings(tmp_path)["learning_rate"] == 1e-3


REFUSED = {
    "no format": (("--method", "i2cl"), "the result of i2cl has no adapter format of PEFT"),
    "no such method": (("--method", "loar"), 'there is no method "loar", did you mean "lora"?'),
    "no such setting": (("--method", "lora", "--set", "rnak=2"), 'the method lora has no setting "rnak"'),
    "no value": (("--method", "lora", "--set", "rank"), "--set rank has no value"),
    "an option": (("--set", "epochs=2"), "has an option of its own; write --epochs 2"),
    "a regularizer": (("--method", "lora", "--sharpness", 1.0), "sharpness is a setting of OFA, and lora has no"),
    "resumed": (("--method", "guided", "--resume"), "keeps no checkpoint and cannot be resumed"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_method_does_not_have_is_refused(arguments, tmp_path, options, message):
    """In one sentence, and without a folder."""
    finished = ofa(*arguments, *options)
    assert finished.status != 0
    assert message in finished.err
    assert not (tmp_path / "adapter").exists()


def test_a_soft_prompt_predicts_and_is_not_merged(arguments, tmp_path):
    done(*arguments, "--method", "soft-prompt", "--max-steps", 1, "--quiet")
    assert done("predict", tmp_path / "adapter", "--text", "a bore", "--json").json[0]["label"] in LABELS.split(",")
    finished = ofa("merge", tmp_path / "adapter", "--out", tmp_path / "merged")
    assert "holds a soft prompt" in finished.err
    assert not (tmp_path / "merged").exists()
