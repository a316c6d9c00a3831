"""The examples for other than plain language models, run small: trained parameters, saved files, loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ofa.adapters.read import read_adapter
from tests import families
from tests.examples.test_loops import example

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*inputs will be cast from.*"),  # LLM.int8 in every layer
    pytest.mark.filterwarnings("ignore:.*requires torchvision.*"),
]


def test_an_encoder_and_its_head_train_and_are_loaded_again(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only scales and head have changed; adapter with head and merged checkpoint give the same logits."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model: Any = families.build("bert")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    folder, out = tmp_path / "bert", tmp_path / "out"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    example("encoder").main(["--model", str(folder), "--out", str(out), "--epochs", "2", "--task", "questions"])
    printed = capsys.readouterr().out
    assert "logits differ by 0.0e+00" in printed
    assert "0.001 * H" in printed

    merged = AutoModelForSequenceClassification.from_pretrained(out / "merged")
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    tuned = set(read_adapter(out / "adapter").parameters)
    changed = {
        path
        for path, value in merged.state_dict().items()
        if value.shape != (own := base.state_dict()[path]).shape or not torch.equal(value, own)
    }
    assert changed == {path for path in tuned if path.endswith("weight")} | {"classifier.weight", "classifier.bias"}
    head = load_file(out / "adapter" / "head.safetensors")
    assert torch.equal(head["weight"], merged.classifier.weight)
    assert merged.config.id2label[0] != "LABEL_0"


def test_a_vision_language_model_trains_its_language_part(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each norm of the language part has changed; those of the vision tower are not in the adapter."""
    options = ["--language", str(tiny_folder), "--steps", "2", "--out", str(tmp_path / "adapter")]
    example("vision_language").main(options)
    parameters = read_adapter(tmp_path / "adapter").parameters
    assert len(parameters) == 7
    assert all(path.startswith("model.language_model.") for path in parameters)
    assert all(float((scale - 1).abs().max()) > 1e-4 for scale in parameters.values())
    assert "step 2: loss" in capsys.readouterr().out


@pytest.mark.parametrize("bits", ["4", "8"])
def test_a_quantized_base_trains(
    bits: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter"
    example("quantized").main(["--model", str(tiny_folder), "--bits", bits, "--steps", "2", "--out", str(out)])
    adapter = read_adapter(out)
    assert adapter.base == str(tiny_folder)
    assert all(float((scale - 1).abs().max()) > 1e-4 for scale in adapter.parameters.values())
    assert "step 2: loss" in capsys.readouterr().out
