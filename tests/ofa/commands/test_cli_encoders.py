"""Encoders through the commands: norm scales and a head are fitted, saved as PEFT and `pipeline` open them, merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import ofa
from ofa.evaluation.head import HeadEncoder
from tests.ofa.command_line import FIT_FILES, done, names, write_rows
from tests.ofa.command_line import ofa as run
from tests.ofa.encoders import KINDS, save_encoder

# PEFT warns about every norm, and tunes it anyway.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")

ROWS = (
    ("the team won the final", "sports"),
    ("shares fell at the bank", "business"),
    ("who wrote the novel", "question"),
    ("extra time in the final", "sports"),
    ("the bank raised its rates", "business"),
    ("how many islands are there", "question"),
)
TEXTS = ["a final at the bank", "how many novels", "<s> rates </s> fell"]


@pytest.fixture(scope="module", params=KINDS)
def encoder(request, tiny_folder, tmp_path_factory):
    return save_encoder(request.param, tiny_folder, tmp_path_factory.mktemp(request.param) / "base")


@pytest.fixture(scope="module")
def bert(tiny_folder, tmp_path_factory):
    return save_encoder("bert", tiny_folder, tmp_path_factory.mktemp("bert") / "base")


WAYS = [*((kind, "norm-tuning") for kind in KINDS), ("deberta-v2", "lora"), ("modernbert", "lora-ofa")]


@pytest.fixture(scope="module", params=WAYS, ids=map("-".join, WAYS))
def fitted(request, tiny_folder, tmp_path_factory):
    """A base, an adapter of it, and what `ofa predict` says with it."""
    kind, method = request.param
    folder = tmp_path_factory.mktemp("fitted")
    base = save_encoder(kind, tiny_folder, folder / kind)
    summary = fit(base, folder, "--method", method, "--max-steps", 12, "--head-learning-rate", 0.1)
    assert summary["last_loss"] < summary["first_loss"]
    assert names(folder / "adapter") == FIT_FILES | {"base_config.json"}
    return base, folder / "adapter", predicted(folder / "adapter")


def fit(encoder, folder, *options, rows=ROWS, template="{text}"):
    train = write_rows(folder / "train.jsonl", rows)
    where = ("--data", train, "--template", template, "--model", encoder, "--out", folder / "adapter")
    return done("fit", *where, "--shots", 2, *options, "--json").json


def predicted(folder, *options):
    texts = [option for text in TEXTS for option in ("--text", text)]
    return done("predict", folder, *options, *texts, "--json").json


def assert_says(classify, answers, **options):
    """A pipeline and `ofa predict` agree; the last text is left out: a pipeline reads its <s> as a control token."""
    for answer, text in zip(answers[:2], TEXTS, strict=False):
        scores = {one["label"]: one["score"] for one in classify(text, top_k=None, **options)}
        assert scores == pytest.approx(answer["probabilities"], abs=1e-6)


def opened(folder):
    """The adapter by transformers alone, with its labels."""
    config = AutoConfig.from_pretrained(folder / "base_config.json")
    return AutoModelForSequenceClassification.from_pretrained(folder, config=config).eval()


def test_peft_and_a_pipeline_open_the_folder(fitted):
    """With the labels of base_config.json: for PEFT as those of the base."""
    base, folder, answers = fitted
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = opened(folder)
    assert model.config.id2label == {0: "business", 1: "question", 2: "sports"}
    assert_says(pipeline("text-classification", model=model, tokenizer=tokenizer), answers)
    bare = AutoModelForSequenceClassification.from_pretrained(base, id2label=model.config.id2label)
    by_peft = PeftModel.from_pretrained(bare, folder).eval()
    batch = tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(by_peft(**batch).logits, model(**batch).logits)


def test_a_merged_checkpoint_needs_nothing_else(fitted, tmp_path):
    """`pipeline`, `ofa predict` through a second fit that keeps its head, and `ofa evaluate` without an adapter."""
    _, folder, answers = fitted
    merged = tmp_path / "merged"
    done("merge", folder, "--out", merged, "--quiet")
    assert_says(pipeline("text-classification", model=str(merged)), answers)
    test = write_rows(tmp_path / "test.jsonl", ROWS)
    evaluated = [
        done("evaluate", *what, "--data", test, "--json").json["negative_log_likelihood"]
        for what in ((folder,), ("--model", merged, "--template", "{text}"))
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-6)
    fit(merged, tmp_path, "--max-steps", 1, "--learning-rate", 1e-30, "--head-learning-rate", 1e-30)
    for answer, again in zip(answers, predicted(tmp_path / "adapter"), strict=True):
        assert again["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-5)


def test_the_model_is_given_back(encoder):
    """After `close`, modules, labels and logits are those that were loaded."""
    loaded = ofa.load_model(str(encoder), device="cpu")
    batch = loaded.tokenizer(TEXTS[0], return_tensors="pt")
    modules, config = dict(loaded.model.named_modules()), loaded.model.config.to_dict()
    with torch.no_grad():
        before = loaded.model(**batch).logits
        for method in ("norm-tuning", "lora", "ia3-ofa"):
            adaptation = ofa.adapt(
                loaded.model, loaded.tokenizer, list(ROWS), "all", template="{text}", method=method, max_steps=3
            )
            assert adaptation.predict_proba(TEXTS).shape == (3, 3)
            adaptation.close()
            assert dict(loaded.model.named_modules()) == modules
            assert loaded.model.config.to_dict() == config
            assert torch.equal(loaded.model(**batch).logits, before)


def test_both_regularizers_measure_an_encoder(encoder, tmp_path, caplog):
    """The norms of ModernBERT come before the branch, so its trace is exact; the others say why theirs is not."""
    fit(encoder, tmp_path, "--max-steps", 2, "--sharpness", 0.1, "--step-ratio", 0.01)
    records = [json.loads(line) for line in (tmp_path / "adapter" / "metrics.jsonl").read_text().splitlines()]
    assert all(record["step_ratio"] > 0 and record["sharpness"] > 0 for record in records)


def test_a_long_text_is_cut_at_its_end_as_in_a_pipeline(fitted):
    base, folder, _ = fitted
    text = " ".join(["the bank"] * 60)
    answer = done("predict", folder, "--text", text, "--json")
    assert "cut" in answer.err
    window = 40 - (3 if "roberta" in str(base) else 0)  # RoBERTa has no token at the positions up to its padding index
    tokenizer = AutoTokenizer.from_pretrained(base, model_max_length=window)
    classify = pipeline("text-classification", model=opened(folder), tokenizer=tokenizer)
    scores = {one["label"]: one["score"] for one in classify(text, top_k=None, truncation=True)}
    assert scores == pytest.approx(answer.json[0]["probabilities"], abs=1e-6)


def test_a_stopped_run_goes_on_to_the_same_adapter(bert, tmp_path, monkeypatch):
    """The checkpoint holds the head and its moments."""
    from ofa.training.loop import _Run

    whole = fit(bert, tmp_path, "--max-steps", 4, "--batch-size", 2)
    done_weights = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "again").mkdir()
    take = _Run._take_step

    def stopping(self, started):
        if self.step == 3:
            raise KeyboardInterrupt
        return take(self, started)

    monkeypatch.setattr(_Run, "_take_step", stopping)
    train = tmp_path / "train.jsonl"
    arguments = [
        "fit",
        "--data",
        train,
        "--template",
        "{text}",
        "--model",
        bert,
        "--out",
        tmp_path / "again" / "adapter",
    ]
    arguments += ["--shots", 2, "--max-steps", 4, "--batch-size", 2]
    assert run(*arguments).status != 0
    monkeypatch.setattr(_Run, "_take_step", take)
    assert done(*arguments, "--resume", "--json").json["last_loss"] == whole["last_loss"]
    assert (tmp_path / "again" / "adapter" / "adapter_model.safetensors").read_bytes() == done_weights


REFUSED = {
    "chat": (("--chat",), "has no chat template"),
    "soft prompt": (("--method", "soft-prompt"), "an encoder reads no prompt for soft-prompt to begin"),
    "label loss": (("--label-loss", 0.5), "has no label words"),
    "no labels": ((), "has no labels, and an encoder chooses"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_meaning_for_an_encoder_is_refused(bert, tmp_path, options, message):
    """In one sentence, and without a folder."""
    columns = ("text", "label") if options else ("prompt", "completion")
    train = write_rows(tmp_path / "train.jsonl", ROWS, columns)
    template = ("--template", "{text}") if options else ()
    finished = run(
        "fit", "--data", train, *template, "--model", bert, "--shots", 2, "--out", tmp_path / "adapter", *options
    )
    assert finished.status != 0
    assert message in finished.err
    assert not (tmp_path / "adapter").exists()


def test_other_commands_refuse_an_encoder(bert, tiny_gguf, tmp_path):
    """Each in one sentence that says what is wrong."""
    fit(bert, tmp_path, "--max-steps", 1)
    adapter, test = tmp_path / "adapter", write_rows(tmp_path / "test.jsonl", ROWS)
    unknown = write_rows(tmp_path / "unknown.jsonl", [*ROWS, ("a film", "culture")])
    data = ("--data", test, "--template", "{text}", "--model", bert)
    for message, *arguments in (
        ("is an encoder, which reads in both", "probe", "--out", tmp_path / "probe", *data),
        (
            "is an encoder, which reads in both",
            "compare",
            "--tasks",
            "reviews",
            "--model",
            bert,
            "--out",
            tmp_path / "results",
        ),
        ("holds the classification head", "merge", adapter, "--gguf", tiny_gguf, "--out", tmp_path / "tuned.gguf"),
        ("reads one text at a time", "evaluate", adapter, "--data", test, "--demonstrations", tmp_path / "train.jsonl"),
        ("answers LABEL_0, LABEL_1 and not 'business'", "evaluate", *data),
        ("culture", "evaluate", adapter, "--data", unknown),
        ("--text number 1: the text is empty", "predict", adapter, "--text", " "),
    ):
        finished = run(*arguments)
        assert finished.status != 0, arguments
        assert message in finished.err, arguments
    assert not (tmp_path / "tuned.gguf").exists()


def test_an_adapter_without_its_labels_is_refused(bert, tmp_path):
    fit(bert, tmp_path, "--max-steps", 1)
    Path(tmp_path / "adapter" / "base_config.json").unlink()
    assert "lacks the labels of its head" in run("predict", tmp_path / "adapter", "--text", "a film").err


def test_a_texts_control_tokens_are_text(bert):
    """As in prompts: </s> in a text does not end it."""
    loaded = ofa.load_model(str(bert), device="cpu")
    loaded.model.config.label2id = {"a": 0, "b": 1}
    ids = HeadEncoder(loaded.model, loaded.tokenizer, ofa.Task("letters", labels=("a", "b"))).encode_prompt("a</s>b")
    assert (ids[0], ids[-1]) == (0, 1)
    assert 1 not in ids[:-1]


def test_a_half_precision_encoder_trains_its_head_in_float32(bert, tmp_path):
    loaded = ofa.load_model(str(bert), dtype="bfloat16", device="cpu")
    adaptation = ofa.adapt(loaded.model, loaded.tokenizer, list(ROWS), "all", template="{text}", max_steps=3)
    assert loaded.model.classifier.weight.dtype == torch.float32
    assert adaptation.predict_proba(TEXTS).isfinite().all()
    adaptation.close()
    assert loaded.model.classifier.weight.dtype == torch.bfloat16
