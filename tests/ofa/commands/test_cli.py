"""The commands together: fit, evaluate, predict, merge, inspect, doctor and demo, from data to results."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, BertConfig, BertLMHeadModel

import ofa as ofa_package
from ofa.adapters.folder import CHECKPOINT
from ofa.commands import doctor as doctor_module
from ofa.commands.data import split_labels
from ofa.commands.demo import _chance
from ofa.evaluation.scorer import Scorer
from ofa.models.load import load_model
from ofa.tasks import Example, Task, load_task
from ofa.training.config import TrainingConfig
from tests import families
from tests.ofa.command_line import (
    ADAPTER_FILES,
    FIT_FILES,
    LABELS,
    TEMPLATE,
    TEST,
    TRAIN,
    Finished,
    done,
    names,
    ofa,
    weights,
    write_rows,
)

TEXTS = [text for text, _ in TEST]
MEGABYTE = 10**6


def details(folder: Path) -> dict:
    return json.loads((folder / "ofa_config.json").read_text(encoding="utf-8"))


def probabilities(checkpoint: Path, task: Task) -> torch.Tensor:
    """The label probabilities of the test texts, without the command line."""
    loaded = load_model(str(checkpoint), device="cpu")
    return Scorer(loaded.model, loaded.tokenizer, task).predict_proba(TEXTS)


@dataclass(frozen=True)
class Round:
    """One finished `ofa fit` and the files it was given."""

    folder: Path
    train: Path
    test: Path
    model: Path
    finished: Finished

    @property
    def arguments(self) -> list[object]:
        """What every fit of these tests has in common with this one."""
        where = ["--data", self.train, "--template", TEMPLATE, "--labels", LABELS, "--model", self.model]
        return [*where, "--shots", 2, "--seed", 7, "--batch-size", 2, "--epochs", 2]


@pytest.fixture(scope="module")
def fitted(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Round:
    folder = tmp_path_factory.mktemp("round")
    train, test = write_rows(folder / "train.jsonl", TRAIN), write_rows(folder / "test.jsonl", TEST)
    plain = Round(folder / "adapter", train, test, tiny_folder, Finished(0, "", ""))
    # Without a calibration, which is no part of a merged checkpoint.
    finished = done("fit", *plain.arguments, "--test", test, "--calibrate", "none", "--out", plain.folder, "--json")
    return Round(plain.folder, train, test, tiny_folder, finished)


def test_fit_writes_a_complete_small_adapter_and_no_checkpoint(fitted: Round) -> None:
    """All documented files, under a megabyte, and no temporary ones."""
    assert names(fitted.folder) == FIT_FILES
    assert sum((fitted.folder / name).stat().st_size for name in ADAPTER_FILES) < MEGABYTE
    assert (fitted.folder / "training.png").read_bytes().startswith(b"\x89PNG")
    steps = [json.loads(line) for line in (fitted.folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(step["step_ratio"] is step["sharpness"] is None for step in steps)


def test_fit_prints_one_json_document(fitted: Round) -> None:
    """Standard output is one JSON document with the documented fields, and standard error stays empty."""
    assert fitted.finished.err == ""
    summary = fitted.finished.json
    assert set(summary) == {
        *("folder", "adapter_bytes", "trainable_parameters", "steps", "first_loss", "last_loss", "drift", "seconds"),
        *("truncated", "best_epoch", "scores", "used", "examples", "method", "calibration", "scored"),
    }
    assert summary["folder"] == str(fitted.folder)
    assert summary["adapter_bytes"] == len(weights(fitted.folder))
    assert (summary["trainable_parameters"], summary["steps"], summary["truncated"]) == (7 * 64, 4, 0)
    assert summary["drift"] > 0


def test_fit_records_what_it_was_made_from_and_no_training_text(fitted: Round) -> None:
    """`ofa_config.json` has task, shots, seed and the `--test` scores; no file repeats the private examples."""
    known = details(fitted.folder)
    assert known["scores"] == fitted.finished.json["scores"]
    assert known["scores"]["count"] == len(TEST)
    assert known["task"] == {
        "name": "train",
        "template": "Sentence: {text}\nLabel:",
        "labels": ["objective", "subjective"],
        "text_column": "text",
        "label_column": "label",
        "columns": ["text"],
    }
    assert (known["shots"], known["seed"], known["method"]) == (2, 7, "norm-tuning")
    assert sorted(TRAIN[index][1] for index in known["indices"]) == ["objective"] * 2 + ["subjective"] * 2
    written = b"".join((fitted.folder / name).read_bytes() for name in FIT_FILES)
    assert not any(text.encode() in written for text, _ in TRAIN)


def test_evaluate_agrees_with_the_scores_of_fit(fitted: Round) -> None:
    """The saved adapter's scores equal those of the tuned model."""
    document = done("evaluate", fitted.folder, "--data", fitted.test, "--json").json
    assert {name: document[name] for name in fitted.finished.json["scores"]} == fitted.finished.json["scores"]
    assert (document["adapter"], document["data"]) == (str(fitted.folder), str(fitted.test))
    assert (document["demonstrations"], document["truncated"], document["count"]) == (0, 0, len(TEST))
    assert document["scored"] in ("first token", "whole word")
    assert {"task", "seconds", "accuracy", "macro_f1", "confusion", "expected_calibration_error", "per_class"} <= set(
        document
    )


def test_evaluate_shows_a_reader_the_scores_and_the_confusion(fitted: Round) -> None:
    """Without --json the same numbers are in tables, not cut to a terminal's width."""
    shown = done("evaluate", fitted.folder, "--data", fitted.test, "--size", 2).out
    assert "test.jsonl: 2 examples" in shown
    assert "accuracy" in shown
    assert "calibration error" in shown
    assert "true ↓ predicted →" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_merged_checkpoint_predicts_what_the_adapter_predicts(fitted: Round, tmp_path: Path) -> None:
    """Merging is exact: bit-identical probabilities from an ordinary checkpoint, and not the base's."""
    answers = done("predict", fitted.folder, *(f"--text={text}" for text in TEXTS), "--json").json
    adapted = torch.tensor([list(answer["probabilities"].values()) for answer in answers])
    told = done("merge", fitted.folder, "--out", tmp_path / "merged")
    assert told.err.splitlines() == [told.err.strip()]
    assert not {CHECKPOINT, ".partial"} & names(tmp_path / "merged")
    task = Task.from_dict(details(fitted.folder)["task"])
    merged, base = (probabilities(place, task) for place in (tmp_path / "merged", fitted.model))
    torch.testing.assert_close(merged, adapted, rtol=0, atol=0)
    assert not torch.equal(base, adapted)
    bare = done("evaluate", "--model", tmp_path / "merged", "--data", fitted.test, "--template", TEMPLATE, "--json")
    assert bare.json["accuracy"] == fitted.finished.json["scores"]["accuracy"]


def test_a_merged_checkpoint_is_like_its_base(fitted: Round, tmp_path: Path) -> None:
    """A bfloat16 base makes a bfloat16 checkpoint, with the base's unchanged tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(fitted.model, dtype=torch.bfloat16).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(fitted.model, padding_side="left")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    done("merge", fitted.folder, "--model", base, "--out", tmp_path / "merged")
    done("merge", fitted.folder, "--model", base, "--out", tmp_path / "wide", "--dtype", "float32")
    ofa_package.merge(str(base), fitted.folder, tmp_path / "by_name")
    for name, dtype in (("merged", torch.bfloat16), ("wide", torch.float32), ("by_name", torch.bfloat16)):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
        assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
        saved = AutoTokenizer.from_pretrained(tmp_path / name)
        assert (saved.padding_side, saved.pad_token) == ("left", None)


@pytest.mark.parametrize(
    "command",
    [
        lambda adapter: ["predict", adapter, "--text", "a film"],
        lambda adapter: ["evaluate", adapter, "--data", "tickets"],
        lambda adapter: ["merge", adapter, "--out", adapter.parent / "merged"],
        lambda adapter: ["probe", adapter, "--data", "tickets", "--out", adapter.parent / "probed"],
    ],
    ids=["predict", "evaluate", "merge", "probe"],
)
def test_a_base_that_moved_is_asked_for(fitted: Round, tmp_path: Path, command) -> None:
    """An adapter records the path of its base; if that no longer exists, the user must name it."""
    adapter = Path(shutil.copytree(fitted.folder, tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "before")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    finished = ofa(*command(adapter))
    assert finished.status == 2
    assert f"made for the model in {tmp_path / 'before'}, which no longer exists" in finished.err
    assert "give its new place with --model" in finished.err
    assert not (tmp_path / "merged").exists()


def test_the_python_on_the_card_of_a_gguf_adapter_runs(fitted: Round, tiny_gguf: Path, tmp_path: Path) -> None:
    """With the folder's path filled in; libraries cannot open a GGUF file as a folder."""
    out = tmp_path / "out"
    done("fit", *fitted.arguments, "--model", tiny_gguf, "--learning-rate", 0.1, "--out", out)
    lines = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    known: dict = {}
    exec(lines.replace("PATH_OF_THIS_FOLDER", str(out)), known)
    expected = load_model(str(tiny_gguf)).model
    ids = torch.arange(3, 9)[None]
    assert not torch.equal(known["base_model"](ids).logits, expected(ids).logits)
    ofa_package.load_adapter(expected, out)
    torch.testing.assert_close(known["model"](ids).logits, expected(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        ([f"--text={text}" for text in TEXTS], ""),
        (["--file", "texts.txt"], ""),
        (["--file", "-"], "\n".join(TEXTS) + "\n\n"),
        (["--text", TEXTS[0], "--file", "-"], "\n".join(TEXTS[1:])),
    ],
    ids=["options", "file", "standard input", "both"],
)
def test_predict_takes_texts_from_everywhere(
    fitted: Round, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], stdin: str
) -> None:
    """Options, a file and a pipe give the same answers in the same order; blank lines at the end are none."""
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    finished = done("predict", fitted.folder, *arguments, "--json", stdin=stdin)
    assert finished.err == ""
    assert [answer["text"] for answer in finished.json] == TEXTS
    for answer in finished.json:
        assert list(answer["probabilities"]) == LABELS.split(",")
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)


def test_predict_shows_a_table(fitted: Round) -> None:
    """Without --json: label, probability and the text."""
    shown = done("predict", fitted.folder, "--text", "a [bold] claim :cat:").out
    assert "probability" in shown
    assert "a [bold] claim :cat:" in shown


def test_config_file_equals_flags(fitted: Round, tmp_path: Path) -> None:
    """A YAML file with the options' names makes a bit-identical adapter."""
    config = tmp_path / "fit.yaml"
    config.write_text(
        f"data: {fitted.train}\nmodel: {fitted.model}\nout: {tmp_path / 'out'}\nlabels: [objective, subjective]\n"
        'template: "Sentence: {text}\\nLabel:"\nshots: 2\nseed: 7\nbatch-size: 2\nepochs: 2\ntest:\njson: true\n'
    )
    summary = done("fit", "--config", config).json
    assert weights(tmp_path / "out") == weights(fitted.folder)
    assert set(summary["scores"]) >= {"accuracy", "count", "unused"}


def test_paths_may_begin_at_home_and_labels_may_have_commas(
    fitted: Round, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a YAML file, which no shell expands: every path, and a list of labels."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(write_rows(tmp_path / "elsewhere" / "none.jsonl", []).parent)
    rows = [(text, "yes, sir" if label == "subjective" else "no") for text, label in TRAIN]
    write_rows(tmp_path / "train.jsonl", rows, ("Review", "kind"))
    (tmp_path / "model").symlink_to(fitted.model)
    run = {"data": "~/train.jsonl", "test": "~/train.jsonl", "model": "~/model", "out": "~/out", "template": TEMPLATE}
    run |= {"labels": ["yes, sir", "no"], "text_column": "review", "label-column": "Kind", "shots": 2, "epochs": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    done("fit", "--config=~/run.yaml")
    task = details(tmp_path / "out")["task"]
    assert (task["labels"], task["text_column"], task["columns"]) == (["yes, sir", "no"], "review", ["review"])
    out = ["--data=~/train.jsonl", "--out=~/labelled.csv"]
    done("predict", "~/out", *out)
    assert done("evaluate", "~/out", "--data=~/train.jsonl", "--json").json["count"] == len(TRAIN)
    assert {file.name for file in tmp_path.iterdir()} >= {"labelled.csv", "out"}
    assert split_labels('"yes, sir",no') == ("yes, sir", "no")


def test_flags_win_over_the_config_file(fitted: Round, tmp_path: Path) -> None:
    """Flags override the file."""
    config = tmp_path / "fit.yaml"
    config.write_text("epochs: 1\nseed: 8\nlearning_rate: 1e-3\n")
    arguments = [argument for argument in fitted.arguments if argument not in ("--seed", 7)]
    done("fit", *arguments, "--config", config, "--out", tmp_path / "out")
    assert details(tmp_path / "out")["settings"]["epochs"] == 2
    assert details(tmp_path / "out")["seed"] == 8


def test_prompt_and_completion_pairs(fitted: Round, tmp_path: Path) -> None:
    """Data without a label set: fitted without a template, measured by exact match, answered with free text."""
    rows = [("12 + 7 is", "19"), ("the capital of France is", "Paris")]
    pairs = write_rows(tmp_path / "sums.jsonl", rows, ("prompt", "completion"))
    where = ["--data", pairs, "--model", fitted.model]
    fit_done = done("fit", *where, "--test", pairs, "--shots", 2, "--epochs", 1, "--out", tmp_path / "out")
    assert "adapter: " in fit_done.err
    assert details(tmp_path / "out")["task"]["labels"] == []
    assert set(details(tmp_path / "out")["scores"]) == {"exact_match", "negative_log_likelihood", "count"}
    for subject in ([tmp_path / "out"], ["--model", fitted.model]):
        document = done("evaluate", *subject, "--data", pairs, "--json").json
        assert document["scored"] == "completion"
        assert document["negative_log_likelihood"] > 0
    (answer,) = done("predict", tmp_path / "out", "--text", "12 + 7 is", "--json").json
    assert set(answer) == {"text", "completion"}


def test_a_folder_with_task_json_needs_neither_template_nor_labels(fitted: Round, tmp_path: Path) -> None:
    """fit takes its train part, evaluate its test part."""
    task = {"name": "subj", "template": "Text: {text}\nKind:", "labels": LABELS.split(",")}
    write_rows(tmp_path / "subj" / "train.jsonl", TRAIN)
    write_rows(tmp_path / "subj" / "test.jsonl", TEST)
    (tmp_path / "subj" / "task.json").write_text(json.dumps(task))
    where = ["--data", tmp_path / "subj"]
    done("fit", *where, "--model", fitted.model, "--shots", 2, "--epochs", 1, "--out", tmp_path / "out")
    assert task.items() <= details(tmp_path / "out")["task"].items()
    assert done("evaluate", tmp_path / "out", *where, "--json").json["count"] == len(TEST)


def test_a_demo_task_is_known_by_its_name(fitted: Round, tmp_path: Path) -> None:
    """`--data tickets` trains on the embedded task; evaluation draws a class-balanced part of its test examples."""
    out = tmp_path / "out"
    done("fit", "--data", "tickets", "--model", fitted.model, "--shots", 1, "--epochs", 1, "--out", out)
    task = load_task("tickets").task
    assert details(out)["task"]["labels"] == list(task.labels)
    document = done("evaluate", out, "--data", "tickets", "--size", 2 * len(task.labels), "--json").json
    assert [row["support"] for row in document["per_class"]] == [2] * len(task.labels)


def test_demonstrations_of_an_adapter_are_its_own_shots(
    fitted: Round, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For a fair comparison, the demonstrations are the shots that the adapter was tuned on, in their order."""
    shown = _spy_on_demonstrations(monkeypatch)
    evaluate = ["evaluate", fitted.folder, "--data", fitted.test, "--demonstrations", fitted.train]
    document = done(*evaluate, "--seed", 99, "--shots", 1, "--json").json
    own = tuple(Example(*TRAIN[index]) for index in details(fitted.folder)["indices"])
    assert (shown, document["demonstrations"]) == ([own], 4)


def test_demonstrations_without_an_adapter_are_drawn(fitted: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    """In-context learning with the bare model: --shots per class, drawn by --seed."""
    shown = _spy_on_demonstrations(monkeypatch)
    bare = ["evaluate", "--model", fitted.model, "--data", fitted.test, "--template", TEMPLATE]
    done(*bare, "--demonstrations", fitted.train, "--shots", 2, "--seed", 7)
    assert {shown[0].count(Example(*row)) for row in TRAIN} == {0, 1}
    assert set(shown[0]) == {Example(*TRAIN[index]) for index in details(fitted.folder)["indices"]}


def _spy_on_demonstrations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Example, ...]]:
    import ofa.evaluation.scorer

    seen, real = [], ofa.evaluation.scorer.evaluate

    def spy(*arguments, demonstrations=(), **options):
        seen.append(demonstrations)
        return real(*arguments, demonstrations=demonstrations, **options)

    monkeypatch.setattr(ofa.evaluation.scorer, "evaluate", spy)
    return seen


def test_evaluate_without_an_adapter_is_zero_shot(fitted: Round) -> None:
    """No training, no demonstrations: the base model's probabilities, in the order of the given labels."""
    bare = ["evaluate", "--model", fitted.model, "--data", fitted.test, "--template", TEMPLATE]
    document = done(*bare, "--labels", "subjective, objective", "--json").json
    assert (document["adapter"], document["demonstrations"]) == (None, 0)
    assert document["labels"] == ["subjective", "objective"]
    task = Task("test", "Sentence: {text}\nLabel:", ("subjective", "objective"))
    best = probabilities(fitted.model, task).argmax(1).tolist()
    hits = [task.labels[index] == label for index, (_, label) in zip(best, TEST, strict=True)]
    assert document["accuracy"] == sum(hits) / len(TEST)


@pytest.mark.parametrize("stop_after", [1, 3], ids=["within an epoch", "in the second epoch"])
def test_resume_continues_to_the_same_adapter(
    fitted: Round, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    """Ctrl-C leaves a checkpoint and no adapter; --resume ends bit-identically to an uninterrupted run."""

    def stops(update):
        return lambda record, total: record.step == stop_after and signal.raise_signal(signal.SIGINT)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("ofa.commands.fit.losses_told", stops)
        finished = ofa("fit", *fitted.arguments, "--out", out)
    assert finished.status == 130
    told = f"ofa: stopped after step {stop_after}; --resume continues from {out / CHECKPOINT}\n"
    assert finished.err == told
    assert names(out) == {CHECKPOINT, "metrics.jsonl"}
    done("fit", *fitted.arguments, "--out", out, "--resume")
    assert weights(out) == weights(fitted.folder)
    assert names(out) == FIT_FILES
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_stopped_run_says_how_to_continue_it(fitted: Round, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command finds a non-empty folder: --resume continues, --overwrite discards the run."""

    def stops(update):
        return lambda record, total: signal.raise_signal(signal.SIGINT)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("ofa.commands.fit.losses_told", stops)
        ofa("fit", *fitted.arguments, "--out", out)
    again = ofa("fit", *fitted.arguments, "--out", out)
    assert again.status == 2
    assert again.err == (
        f"ofa: {out} holds a run that was stopped ({CHECKPOINT}); pass --resume to continue it, --overwrite to start "
        "again, or choose another folder\n"
    )


@pytest.mark.parametrize(
    ("shots", "said", "scored"),
    [
        (
            1,
            "2 of 6 examples used; ",
            "accuracy {:.3f} on all of the 4 examples that were not used",
        ),
        ("all", "6 of 6 examples used; ", None),
    ],
)
def test_the_number_of_used_examples_is_shown_and_the_others_are_scored(
    fitted: Round, tmp_path: Path, shots: object, said: str, scored: str | None
) -> None:
    """Without --test only the examples that were not drawn give a meaningful score."""
    finished = done("fit", *fitted.arguments, "--shots", shots, "--out", tmp_path / "out")
    assert said in finished.err
    known = details(tmp_path / "out")
    assert (known["shots"], len(known["indices"]), known["examples"]) == (shots, 2 if scored else 6, 6)
    if scored is None:
        assert known["scores"] == {}
        return
    others = [row for index, row in enumerate(TRAIN) if index not in known["indices"]]
    document = done("evaluate", tmp_path / "out", "--data", write_rows(tmp_path / "others.jsonl", others), "--json")
    assert known["scores"]["accuracy"] == document.json["accuracy"]
    assert (known["scores"]["count"], known["scores"]["unused"]) == (4, 4)
    assert scored.format(document.json["accuracy"]) in finished.out.splitlines()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "On 4 examples of the 4 training examples that were not used." in card
    assert "| examples used | 2 of 6 |" in card


def test_overwrite_replaces_an_adapter(fitted: Round, tmp_path: Path) -> None:
    """--overwrite allows a second run in the same folder, which then has only the second adapter."""
    out = tmp_path / "out"
    done("fit", *fitted.arguments, "--out", out, "--learning-rate", 2e-2)
    assert weights(out) != weights(fitted.folder)
    done("fit", *fitted.arguments, "--out", out, "--overwrite")
    assert weights(out) == weights(fitted.folder)
    assert names(out) == FIT_FILES


def test_validation_examples_choose_the_epoch(fitted: Round, tmp_path: Path) -> None:
    """With --validation the best epoch is kept and reported; with both weights 0, the method is norm tuning."""
    options = ["--validation", fitted.test, "--step-ratio", 0, "--sharpness", 0, "--out", tmp_path / "out", "--json"]
    assert done("fit", *fitted.arguments, *options).json["best_epoch"] in (1, 2)
    assert details(tmp_path / "out")["method"] == "norm-tuning"


def test_every_setting_is_an_option_of_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a help text, under the library's names."""
    monkeypatch.setenv("COLUMNS", "400")
    shown = done("fit", "--help").out
    for name, field in TrainingConfig.model_fields.items():
        assert f"--{name.replace('_', '-')} " in shown
        assert field.description in shown


def test_inspect_describes_the_model(tiny_folder: Path) -> None:
    """As JSON: what is tuned, where the steps are, which estimators apply."""
    document = done("inspect", tiny_folder, "--json").json
    assert document["model"] == str(tiny_folder)
    assert (document["family"], document["layers"], document["tuned_parameters"]) == ("llama", 3, 7 * 64)
    assert document["steps"] == {"sublayer": 6, "layer": 3}
    assert [(norm["kind"], norm["multiplies_by"], norm["count"]) for norm in document["norms"]] == [
        ("RMSNorm", "weight", 7)
    ]
    norms = [branch["norm"] for step in document["first_layer"] for branch in step["branches"]]
    assert norms == ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"]
    assert {"name": "hutchinson", "applies": True, "remark": ""} in document["estimators"]
    assert document["fused_layers"] == {"count": 3, "remark": ""}


def test_inspect_describes_an_encoder_too(tiny_folder: Path, tmp_path: Path) -> None:
    """Also one that was saved with another head."""
    config = BertConfig(**families.SIZE, intermediate_size=48)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    document = done("inspect", tmp_path, "--json").json
    assert document["family"] == "bert"
    remark = "in the wiring 'post norm' no norm follows a residual sum"
    assert document["fused_layers"] == {"count": 0, "remark": remark}


def test_inspect_shows_tables(tiny_folder: Path) -> None:
    """For a reader: the same facts. The layer is named once, so that the widest table fits into a terminal."""
    shown = done("inspect", tiny_folder).out
    for words in ("448", "7 × RMSNorm", "6 per sublayer", "hutchinson: applies", "steps of model.layers.0", " mlp "):
        assert words in shown
    assert max(map(len, shown.splitlines())) <= 100


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_doctor_examines_the_installation(empty_cache: Path) -> None:
    """Versions, devices, the kernels of each device and the cache, for a bug report."""
    finished = done("doctor", "--json")
    document = finished.json
    assert finished.err == ""
    assert {"ofa-adapt", "python", "torch", "transformers", "peft", "triton"} <= set(document["versions"])
    assert document["versions"]["torch"] == torch.__version__
    assert document["devices"][0]["name"] == "cpu"
    assert document["threads"]["threads"] == document["threads"]["OMP_NUM_THREADS"] == 1
    assert document["devices"][0]["remark"] == "1 thread: as OMP_NUM_THREADS says"
    assert [row["device"] for row in document["kernels"]] == [device["name"] for device in document["devices"]]
    assert {"device", "norm_step"} < set(document["kernels"][0])
    assert document["cache"]["folder"].startswith(str(empty_cache))
    assert document["cache"]["default_model"] is False
    assert any("default model is not in the cache" in advice for advice in document["advice"])


def test_doctor_notices_the_other_ofa(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ofa` on PyPI is an unrelated project; if it is installed, the advice says so."""
    assert "pip uninstall ofa" not in done("doctor").out
    metadata = tmp_path / "site" / "ofa-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: ofa\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert "pip uninstall ofa, then install ofa-adapt again" in done("doctor").out


def test_doctor_prints_commands_that_can_be_copied(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in the advice keeps its brackets and stays on one line."""
    monkeypatch.setattr(doctor_module, "_devices", lambda threads: [{"name": "cuda:0", "remark": "[a] GPU"}])
    monkeypatch.setattr(doctor_module, "_kernels", lambda devices: [])
    monkeypatch.setattr(doctor_module, "_version", lambda name: None if name in ("triton", "ofa") else "1")
    shown = done("doctor").out
    assert 'pip install -c constraints.txt -e ".[cuda]"' in shown
    assert "[a] GPU" in shown


@pytest.mark.parametrize(("better", "worse", "p"), [(0, 0, 1.0), (5, 5, 1.0), (6, 0, 2 / 64), (2, 7, 2 * 46 / 512)])
def test_the_demo_says_how_sure_its_gain_is(better: int, worse: int, p: float) -> None:
    """McNemar's exact test, by hand: (1 + 9 + 36) of 2⁹ outcomes have at most two of nine."""
    assert _chance(better, worse) == pytest.approx(p)


def test_demo_compares_four_ways_and_keeps_the_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    """Rows, figure and adapter; a second run may replace what a first one made."""
    out = tmp_path / "demo"
    arguments = ["demo", "--model", tiny_folder, "--epochs", 1, "--size", 20, "--shots", 2, "--out", out]
    first = done(*arguments, "--json").json
    assert [row["method"] for row in first["rows"]] == [
        "zero-shot",
        "in-context learning",
        "norm tuning (PEFT)",
        "ofa fit",
    ]
    assert [row["trainable_parameters"] for row in first["rows"]] == [0, 0, 448, 448]
    assert all(0 <= row["accuracy"] <= 1 and row["test_seconds"] > 0 for row in first["rows"])
    assert (first["test_examples"], first["adapter_bytes"]) == (20, len(weights(out / "adapter")))
    assert names(out) == {"adapter", "demo.json", "training.png"}
    assert json.loads((out / "demo.json").read_text()) == first
    assert names(out / "adapter") == ADAPTER_FILES
    done("predict", out / "adapter", "--text", "a warm and funny film")
    second = done(*arguments, "--seed", 1)
    assert "in-context learning" in second.out
    assert "ofa fit gained" in second.err
    assert f"ofa predict {out / 'adapter'} --text" in second.err
    assert json.loads((out / "demo.json").read_text())["seed"] == 1
