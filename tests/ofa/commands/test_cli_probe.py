"""`ofa probe`: figure and data of adapters and their base, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ofa.commands.probe import BASE
from tests.ofa.command_line import LABELS, TEMPLATE, TEST, TRAIN, Finished, done, names, ofa, write_rows

PAIRS = ("prompt", "completion")
FILES = {"probe.json", "probe.png"}


@dataclass(frozen=True)
class Probed:
    """Two adapters of the tiny model, and one finished `ofa probe` of both."""

    here: Path
    model: Path
    finished: Finished

    @property
    def adapters(self) -> tuple[Path, Path]:
        return self.here / "norm-tuning", self.here / "ofa"

    @property
    def test(self) -> Path:
        return self.here / "test.jsonl"


@pytest.fixture(scope="module")
def probed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Probed:
    here = tmp_path_factory.mktemp("probed")
    train, test = write_rows(here / "train.jsonl", TRAIN), write_rows(here / "test.jsonl", TEST)
    given = ["--data", train, "--template", TEMPLATE, "--model", tiny_folder, "--shots", 2, "--epochs", 1]
    done("fit", *given, "--sharpness", 1, "--learning-rate", 0.05, "--out", here / "ofa")
    off = ["--step-ratio", 0, "--sharpness", 0]
    done("fit", *given, *off, "--learning-rate", 0.05, "--out", here / "norm-tuning")
    both = [here / "norm-tuning", here / "ofa"]
    finished = done("probe", *both, "--data", test, "--linear-probe", train, "--out", here / "out", "--json")
    return Probed(here, tiny_folder, finished)


def test_adapters_may_stand_in_a_configuration_file(probed: Probed, tmp_path: Path) -> None:
    """Repeated arguments are a list there, and the run equals the typed one."""
    adapters = "".join(f"  - {adapter}\n" for adapter in probed.adapters)
    config = tmp_path / "probe.yaml"
    config.write_text(f"adapters:\n{adapters}data: {probed.test}\nout: {tmp_path / 'out'}\n")
    found = done("probe", "--config", config, "--json").json
    assert [one["name"] for one in found["models"]] == [one["name"] for one in probed.finished.json["models"]]


def test_it_writes_a_figure_and_its_data(probed: Probed) -> None:
    """Two complete files; the JSON document on standard output equals the file."""
    assert names(probed.here / "out") == FILES
    assert (probed.here / "out" / "probe.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((probed.here / "out" / "probe.json").read_text()) == probed.finished.json
    assert probed.finished.err == ""
    document = probed.finished.json
    assert [(one["name"], one["adapter"] is None) for one in document["models"]] == [
        *((BASE, True), ("norm-tuning", False), ("ofa", False))
    ]
    assert document["estimators"] == {"sublayer": "exact", "layer": "hutchinson"}
    assert (document["texts"], document["training"], document["demonstrations"]) == (4, 6, 0)
    assert document["scored"] in ("first token", "whole word")


def test_the_curves_have_every_point(probed: Probed) -> None:
    """Of 3 layers and 6 sublayers, ratios from the second step."""
    for model in probed.finished.json["models"]:
        curves = model["curves"]
        assert {metric: curve["step"] for metric, curve in curves["sublayer"].items()} == {
            "step_norm": [1, 2, 3, 4, 5, 6],
            "step_ratio": [2, 3, 4, 5, 6],
            "trace": [1, 2, 3, 4, 5, 6],
        }
        assert set(curves["layer"]) == {
            *("lens_accuracy", "lens_loss", "linear_accuracy", "linear_loss"),
            *("step_norm", "step_ratio", "trace"),
        }
        assert curves["layer"]["lens_loss"]["layer"] == [1, 2, 3]


@pytest.mark.parametrize("name", [BASE, "norm-tuning", "ofa"])
def test_models_do_not_affect_each_other(probed: Probed, name: str) -> None:
    """After the last layer, the scores equal `ofa evaluate` of that model alone: no adapter stays in the next model."""
    told = {one["name"]: one for one in probed.finished.json["models"]}
    subject = [probed.here / name] if name != BASE else ["--model", probed.model, "--template", TEMPLATE]
    alone = done("evaluate", *subject, "--data", probed.test, "--json").json
    assert told[name]["accuracy"] == alone["accuracy"]
    assert told[name]["curves"]["layer"]["lens_accuracy"]["value"][-1] == pytest.approx(alone["accuracy"])
    assert len({one["loss"] for one in told.values()}) == 3


def test_the_base_alone_can_be_probed(probed: Probed, tmp_path: Path) -> None:
    """Without an adapter, data and template define the task; the output is a table and the files' paths."""
    bare = ["--model", probed.model, "--data", probed.test, "--template", TEMPLATE, "--labels", LABELS]
    finished = done("probe", *bare, "--size", 2, "--out", tmp_path / "out")
    assert BASE in finished.out
    assert "test.jsonl: 2 texts; J and H by sublayer" in finished.out
    assert str(tmp_path / "out" / "probe.png") in finished.err
    (base,) = json.loads((tmp_path / "out" / "probe.json").read_text())["models"]
    assert "linear_accuracy" not in base["curves"]["layer"]


def test_options_reach_the_measurement(probed: Probed, tmp_path: Path) -> None:
    """Estimator, demonstrations from a draw, and the convention: its sign turns every trace without noise."""
    bare = ["--model", probed.model, "--data", probed.test, "--template", TEMPLATE]
    exact = done("probe", *bare, "--convention", "algorithm1", "--out", tmp_path / "out", "--json").json
    before, turned = (
        document["models"][0]["curves"]["sublayer"]["trace"]["value"] for document in (probed.finished.json, exact)
    )
    assert turned == pytest.approx([-value for value in before])
    shown = ["--demonstrations", probed.here / "train.jsonl", "--shots", 1]
    arguments = [
        "probe",
        *bare,
        *shown,
        "--estimator",
        "hutchinson",
        "--out",
        tmp_path / "out",
        "--overwrite",
        "--json",
    ]
    document = done(*arguments).json
    assert document["demonstrations"] == 2
    assert document["estimators"] == {"sublayer": "hutchinson", "layer": "hutchinson"}
    assert document["models"][0]["accuracy"] == done("evaluate", *bare, *shown, "--json").json["accuracy"]


def test_adapters_of_one_name_are_told_apart_by_their_place(probed: Probed, tmp_path: Path) -> None:
    """Two runs often end in folders of the same name."""
    other = Path(shutil.copytree(probed.adapters[1], tmp_path / "other" / "ofa"))
    arguments = ["probe", probed.adapters[1], other, "--data", probed.test, "--size", 2, "--out", tmp_path / "out"]
    told = done(*arguments, "--json").json["models"]
    assert [one["name"] for one in told] == [BASE, str(probed.adapters[1]), str(other)]


Case = tuple[Callable[[Probed, Path], list[object]], tuple[str, ...]]

REFUSALS: dict[str, Case] = {
    "no adapter there": (
        lambda p, here: [p.here, "--data", p.test],
        ("is not an adapter folder", "`ofa fit` wrote"),
    ),
    "adapter given twice": (
        lambda p, here: [p.adapters[0], p.adapters[0] / ".", "--data", p.test],
        ("norm-tuning is given twice", "name it once"),
    ),
    "adapters of different tasks": (
        lambda p, here: [p.adapters[0], _retold(p.adapters[1], here, template="Text: {text}"), "--data", p.test],
        ("made for another template or other labels", "one by one"),
    ),
    "adapter of another base": (
        lambda p, here: [p.adapters[0], _retold(p.adapters[1], here, base="0" * 64), "--data", p.test],
        ("this model's own norms differ", "load that base instead"),
    ),
    "adapter without its task": (
        lambda p, here: [_retold(p.adapters[1], here, task=None), "--data", p.test],
        ("does not name its task", "make it with `ofa fit`"),
    ),
    "template for adapters": (
        lambda p, here: [p.adapters[0], "--data", p.test, "--template", TEMPLATE],
        ("brings its own template", "leave out --template"),
    ),
    "open-ended task": (
        lambda p, here: [
            *(
                "--model",
                p.model,
                "--data",
                write_rows(here / "sums.jsonl", [("1 + 1 is", "2")], ("prompt", "completion")),
            )
        ],
        ("'sums' has no labels", "`ofa evaluate` scores open-ended tasks"),
    ),
    "no examples": (
        lambda p, here: [p.adapters[0], "--data", write_rows(here / "none.jsonl", [])],
        ("none.jsonl", "example"),
    ),
    "unknown estimator": (
        lambda p, here: [p.adapters[0], "--data", p.test, "--estimator", "guess"],
        ("estimator must be 'auto'", "not 'guess'"),
    ),
    "label missing for the linear probe": (
        lambda p, here: [
            *(p.adapters[0], "--data", p.test, "--linear-probe", write_rows(here / "one.jsonl", [("a", "objective")]))
        ],
        ("of the linear probe have none of the label 'subjective'", "give some of every label"),
    ),
    "too few demonstrations": (
        lambda p, here: [p.adapters[0], "--data", p.test, "--demonstrations", p.here / "train.jsonl", "--shots", 9],
        ('the class "objective" has 3 training examples but 9 shots', "ask for fewer"),
    ),
}


def _retold(adapter: Path, here: Path, **change: object) -> Path:
    """A copy of an adapter with a changed `ofa_config.json`."""
    copy = Path(shutil.copytree(adapter, here / "retold"))
    known = json.loads((copy / "ofa_config.json").read_text())
    if "template" in change:
        known["task"]["template"] = change["template"]
    if "base" in change:
        known |= dict.fromkeys(("base_fingerprint", "base_fingerprint_float16"), change["base"])
    if "task" in change:
        del known["task"]
    (copy / "ofa_config.json").write_text(json.dumps(known))
    return copy


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_in_one_sentence(probed: Probed, tmp_path: Path, case: str) -> None:
    """Status 2, one line with what, where and what to do, and no new folder."""
    arguments, words = REFUSALS[case]
    finished = ofa("probe", *arguments(probed, tmp_path), "--out", tmp_path / "new" / "out")
    assert finished.status == 2, finished.err
    assert len(finished.err.strip().splitlines()) == 1
    assert all(word in finished.err for word in words), finished.err
    assert not (tmp_path / "new").exists()


def test_results_are_not_written_over_by_accident(probed: Probed) -> None:
    finished = ofa("probe", probed.adapters[0], "--data", probed.test, "--out", probed.here / "out")
    assert finished.status == 2
    assert "already holds probe.json and more; choose another one or pass --overwrite" in finished.err


def test_a_disk_that_fills_leaves_the_old_files(probed: Probed, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three files are replaced together or not at all; the figure is the last to be written."""
    from matplotlib.figure import Figure

    def full(*given, **options):
        raise OSError(28, "No space left on device")

    out = probed.here / "out"
    before = {name: (out / name).read_bytes() for name in FILES}
    monkeypatch.setattr(Figure, "savefig", full)
    finished = ofa("probe", probed.adapters[0], "--data", probed.test, "--size", 2, "--out", out, "--overwrite")
    assert finished.status == 2
    assert "probe.png cannot be written (No space left on device)" in finished.err
    assert {name: (out / name).read_bytes() for name in FILES} == before
    assert names(out) == FILES
