"""The card of an adapter folder: front matter that the hub's own library reads, and what a reader needs to know."""

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


def test_the_library_reads_back_what_it_was_told(tmp_path):
    """Scores become a model index with the data set, its split and the measure; `ModelCard` checks the whole."""
    card = saved(tmp_path, task=TASK, scores=SCORES, shots=5, data=SST2)
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("peft", "text-generation", "owner/base")
    assert (data.datasets, data.base_model_relation) == (["SetFit/sst2"], "adapter")
    assert {"ln-tuning", "ofa", "few-shot", "arxiv:2505.19107"} == set(data.tags)
    told = [(one.metric_type, one.metric_value, one.dataset_type, one.dataset_split) for one in data.eval_results]
    assert told == [("accuracy", 0.75, "SetFit/sst2", "test"), ("f1", 0.7012, "SetFit/sst2", "test")]
    assert {(one.task_type, one.dataset_name) for one in data.eval_results} == {("text-classification", "sst2")}
    assert data.model_name == "Norm scales for reviews"


def test_the_text_says_what_it_was_made_from_and_how_good_it_is(tmp_path):
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
def test_a_base_that_is_no_hub_id_is_not_offered_as_one(base, tmp_path):
    """A hub would look it up, or refuse the card; the text says it all the same."""
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
    """A number that says not what it was measured on is shown, but is nothing to compare others with."""
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
def test_data_is_named_by_what_others_know_of_it(data, origin):
    """No path of this machine: a card is there to be published."""
    assert data_origin(data) == origin
