"""The model card: front matter that the hub's library reads, and the text."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

import ofa
from ofa.adapters.folder import CARD
from ofa.commands.data import data_origin
from tests.families import build

TASK = {"name": "reviews", "template": "Review: {text}\nSentiment:", "labels": ["bad", "go|od"]}
SCORES = {"accuracy": 0.75, "macro_f1": 0.7012345, "expected_calibration_error": 0.05, "count": 200, "labels": ["x"]}
SST2 = {"train": data_origin("sst2"), "test": data_origin("sst2")}


def saved(folder, family="llama", base="owner/base", **details):
    model = build(family)
    model.config.name_or_path = ""
    ofa.save_adapter(model, folder, base_model=base, details=details)
    return ModelCard((folder / CARD).read_text())


def test_the_hub_s_library_reads_the_front_matter_back(tmp_path):
    """Scores become a model index with data set, split and metric; `ModelCard` validates it."""
    card = saved(tmp_path, task=TASK, scores=SCORES, shots=5, data=SST2)
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("peft", "text-generation", "owner/base")
    assert (data.datasets, data.base_model_relation) == (["SetFit/sst2"], "adapter")
    assert {"ln-tuning", "ofa", "few-shot", "arxiv:2505.19107"} == set(data.tags)
    told = [(one.metric_type, one.metric_value, one.dataset_type, one.dataset_split) for one in data.eval_results]
    assert told == [("accuracy", 0.75, "SetFit/sst2", "test"), ("f1", 0.7012, "SetFit/sst2", "test")]
    assert {(one.task_type, one.dataset_name) for one in data.eval_results} == {("text-classification", "sst2")}
    assert data.model_name == "Norm scales for reviews"


def test_the_text_has_origin_and_scores(tmp_path):
    settings = {"step_ratio": 0.01, "sharpness": 0.0}
    told = saved(tmp_path, task=TASK, scores=SCORES, shots=5, seed=7, method="ofa", settings=settings, data=SST2).text
    for words in (
        "# Norm scales for reviews",
        "of `owner/base`, and nothing else",
        "| data | `sst2`, [SetFit/sst2](https://huggingface.co/datasets/SetFit/sst2) |",
        r"| template | `'Review: {text}\nSentiment:'` |",
        r"| labels | bad, go\|od |",
        "| shots | 5 |",
        "| seed | 7 |",
        "| step ratio, sharpness | 0.01, 0 |",
        "On 200 examples of `sst2`",
        "without demonstrations",
        "| accuracy | 0.7500 |",
        "AutoPeftModelForCausalLM",
        "ofa predict PATH_OF_THIS_FOLDER",
        "Made with ofa-adapt",
    ):
        assert words in told


@pytest.mark.parametrize(
    "base", ["/home/me/models/base", "C:\\models: mine # 2", "models/../base", "base.gguf copy", None]
)
def test_a_base_without_a_hub_id_is_only_in_the_text(base, tmp_path):
    """In the front matter, the hub would look it up or refuse the card."""
    card = saved(tmp_path, base=base)
    assert card.data.base_model is None
    assert (f"`{base}`" if base else "an unnamed model") in card.text


def test_an_encoder_is_opened_with_its_own_class(tmp_path):
    """PEFT's automatic class is for causal models."""
    card = saved(tmp_path, "bert")
    assert card.data.pipeline_tag is None
    assert "PeftModel.from_pretrained(base_model" in card.text
    assert "AutoPeft" not in card.text


def test_scores_without_their_data_are_no_result(tmp_path):
    """A score without its test data is shown in the text, but not in the model index."""
    card = saved(tmp_path, task=TASK, scores=SCORES)
    assert card.data.eval_results is None
    assert "| accuracy | 0.7500 |" in card.text


@pytest.mark.parametrize(
    ("data", "origin"),
    [
        ("reviews", {"name": "reviews", "origin": "a demo task of ofa"}),
        ("trec", {"name": "trec", "hub_id": "SetFit/TREC-QC"}),
        ("someone/data", {"name": "someone/data", "hub_id": "someone/data"}),
        ("/home/me/secret project/train.jsonl", {"name": "train.jsonl", "origin": "local data"}),
    ],
)
def test_data_is_named_without_local_paths(data, origin):
    """A card is for publication."""
    assert data_origin(data) == origin
