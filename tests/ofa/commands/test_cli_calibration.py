"""`--calibrate`, `--abstain-below` and `--class-weights`: probabilities that one can use."""

from __future__ import annotations

import json

import pytest

from ofa.commands.predictions import PredictionFile
from ofa.methods.calibrating import FIXED_TEMPERATURE
from tests.ofa.command_line import LABELS, TEMPLATE, TEST, TRAIN, done, ofa, weights, write_rows


@pytest.fixture
def fit(tiny_folder, tmp_path):
    """Run `ofa fit` with some options; the folder."""
    train = write_rows(tmp_path / "train.jsonl", TRAIN)

    def run(name, *options, command=done):
        where = ["--data", train, "--template", TEMPLATE, "--labels", LABELS, "--model", tiny_folder]
        finished = command("fit", *where, "--max-steps", 1, "--shots", 2, "--out", tmp_path / name, *options)
        return finished if command is ofa else tmp_path / name

    return run


def calibration(folder):
    return json.loads((folder / "ofa_config.json").read_text(encoding="utf-8")).get("calibration")


def test_a_temperature_of_folds_leaves_the_scales_alone(fit, tmp_path):
    """evaluate shows before and after, and predict gives the probabilities that evaluate measures."""
    plain, calibrated = fit("plain", "--calibrate", "none"), fit("calibrated", "--calibrate", "temperature")
    assert weights(plain) == weights(calibrated)
    assert (calibration(calibrated)["folds"], calibration(calibrated)["held_out"]) == (2, 4)
    details = json.loads((calibrated / "ofa_config.json").read_text(encoding="utf-8"))
    details["calibration"]["temperature"] = 4.0  # far from 1, so that it shows
    (calibrated / "ofa_config.json").write_text(json.dumps(details), encoding="utf-8")
    test = write_rows(tmp_path / "test.jsonl", TEST)
    before, after = (done("evaluate", one, "--data", test, "--json").json for one in (plain, calibrated))
    names = ("accuracy", "expected_calibration_error", "negative_log_likelihood", "brier_score")
    assert after["uncalibrated"] == {name: before[name] for name in names}
    assert after["accuracy"] == before["accuracy"]
    assert after["brier_score"] != before["brier_score"]
    assert "before calibration" in done("evaluate", calibrated, "--data", test).out
    own, warm = (
        max(done("predict", one, "--text", "a bore", "--json").json[0]["probabilities"].values())
        for one in (plain, calibrated)
    )
    assert 0.5 <= warm < own


@pytest.mark.parametrize(
    ("options", "temperature"),
    [((), FIXED_TEMPERATURE), (("--calibrate", "none"), None), (("--no-relative",), None), (("--method", "ia3"), None)],
    ids=["default", "none", "absolute steps", "another method"],
)
def test_relative_steps_have_a_fixed_temperature(fit, options, temperature):
    """Not measured for others, whose probabilities stay as they are."""
    found = calibration(fit("adapter", *options))
    assert (found and found["temperature"]) == temperature


def test_a_temperature_of_validation_trains_once(fit, tmp_path):
    test = write_rows(tmp_path / "validation.jsonl", TEST)
    folder = fit("adapter", "--calibrate", "both", "--validation", test)
    assert (calibration(folder)["folds"], calibration(folder)["held_out"]) == (0, len(TEST))
    assert len(calibration(folder)["prior"]) == 2


def test_abstaining_leaves_the_label_out(fit):
    folder = fit("adapter")
    certain = done("predict", folder, "--text", "a bore", "--abstain-below", 0.5, "--json").json[0]
    abstained = done("predict", folder, "--text", "a bore", "--abstain-below", 1, "--json").json[0]
    assert certain["label"] in LABELS.split(",")
    assert abstained["label"] is None
    assert abstained["probabilities"] == certain["probabilities"]


def test_what_was_withheld_is_counted_over_a_stop(fit, tmp_path, monkeypatch):
    """The second run reports the rows of the first, too; a row without text is not one of them."""
    folder, data, out = fit("adapter"), tmp_path / "new.jsonl", tmp_path / "labelled.csv"
    write_rows(data, [("a bore", ""), ("a warm film", ""), ("", ""), ("it drags", "")])
    where = ["predict", folder, "--data", data, "--abstain-below", 1, "--batch-size", 1]
    told = "3 of 4 rows have no label: every label is below 1\n"
    assert told in done(*where).err
    monkeypatch.setattr("ofa.commands.predict._BATCHES", 2)
    written = []

    def stopped(file, rows, answers):
        if written:
            raise KeyboardInterrupt
        written.append(append(file, rows, answers))

    with monkeypatch.context() as patched:
        append = PredictionFile.append
        patched.setattr(PredictionFile, "append", stopped)
        assert ofa(*where, "--out", out).status != 0
    assert told in done(*where, "--out", out, "--resume").err


def test_balanced_classes_weigh_the_same(fit, tmp_path):
    """Equal classes train to the same bits; others to other scales."""
    assert weights(fit("equal")) == weights(fit("weighed", "--class-weights", "balanced"))
    rows = write_rows(tmp_path / "skewed.jsonl", [*TRAIN, TRAIN[0], TRAIN[2]])
    unequal = ["--data", rows, "--shots", "all", "--batch-size", 8]
    assert weights(fit("skewed", *unequal)) != weights(fit("skewed-weighed", *unequal, "--class-weights", "balanced"))


REFUSED = {
    "another kind": (("--calibrate", "heat"), "there is no calibration 'heat'"),
    "one shot": (("--calibrate", "temperature", "--shots", 1), "a class has one shot only"),
    "other weights": (("--class-weights", "heavy"), "'heavy' is not one of 'balanced'"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused(fit, tmp_path, options, message):
    finished = fit("adapter", *options, command=ofa)
    assert finished.status != 0
    assert message in finished.err
    assert not (tmp_path / "adapter").exists()


def test_evaluate_counts_the_classes(fit, tmp_path):
    shown = done("evaluate", fit("adapter"), "--data", write_rows(tmp_path / "test.jsonl", TEST)).out
    assert "classes" in shown
    assert "predicted" in shown
