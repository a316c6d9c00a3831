"""The paper's results stand only beside the model they were made with, and each has a source."""

from __future__ import annotations

import pytest

from ofa.methods import METHODS
from ofa.report import background
from ofa.report.content import build
from ofa.report.paper import paper_results
from tests.ofa.report.synthetic import record, with_accuracy


@pytest.mark.parametrize(
    ("model", "known"),
    [
        ("meta-llama/Llama-2-7b-hf", "Llama2-7B"),
        ("/models/llama-2-7b-hf/", "Llama2-7B"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "Llama3-8B-Instruct"),
        ("meta-llama/Llama-2-7b-chat-hf", None),
        ("meta-llama/Llama-2-13b-hf", None),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", None),
    ],
)
def test_a_model_is_the_papers_or_it_is_not(model, known):
    """A tuned variant of the same base is another model."""
    found = paper_results(model)
    assert (found.model if found else None) == known


def test_every_result_is_an_accuracy_with_its_source():
    results = paper_results("Llama-2-7b-hf").results
    assert len(results) == 5
    for result in results:
        assert 0.5 < result.accuracy < 1
        assert result.method in METHODS
        assert result.context in ("prompt", "demonstrations", None)
        assert "2505.19107" in result.source


def test_a_model_without_a_known_result_has_no_table():
    (comparison,) = build([record("ofa", {"prompt": with_accuracy(9)}, model="Llama-3-8B-Instruct")]).comparisons
    assert background.paper(comparison) is None


def test_ours_stand_beside_theirs_by_task_method_and_context():
    """The paper's row without a stated context stands beside both of ours; what we have not run is a dash."""
    ours = record(
        "norm-tuning",
        {"prompt": with_accuracy(9), "demonstrations": with_accuracy(8)},
        model="meta-llama/Llama-2-7b-hf",
        task="sst2",
    )
    table = background.paper(build([ours]).comparisons[0])
    rows = {tuple(entry.text for entry in row[:3]): [entry.text for entry in row[3:]] for row in table.rows}
    assert rows["sst2", "norm-tuning", "without"] == ["93.5", "90.0", "80.0"]
    assert rows["sst2", "norm-tuning", "with"] == ["95.8", "90.0", "80.0"]
    assert rows["sst2", "ofa", "not stated"] == ["95.84", "–", "–"]
    assert rows["hatespeech18", "norm-tuning", "with"] == ["82.4", "–", "–"]
