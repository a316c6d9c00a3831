"""The examples for other than plain language models, run small: trained parameters, saved files, loading."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from ofa.adapters.read import read_adapter
from tests.examples.test_loops import example

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*inputs will be cast from.*"),  # LLM.int8 in every layer
    pytest.mark.filterwarnings("ignore:.*requires torchvision.*"),
]


def test_a_vision_transformer_is_adapted_to_turned_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every method has its row; the adapter holds scales and head, which PEFT opens."""
    digits = example("vit_digits")
    options = ["--pretraining", "3", "--steps", "2", "--shots", "1", "--seeds", "1", "--out", str(tmp_path)]
    digits.main(options)
    printed = capsys.readouterr().out
    assert all(re.search(rf"{re.escape(name)} +[\d,]+  0\.\d", printed) for name in digits.METHODS)
    adapter = read_adapter(tmp_path / "1")
    assert set(adapter.head) == {"classifier.weight", "classifier.bias"}
    opened = PeftModel.from_pretrained(digits.vit(), tmp_path / "1")
    assert torch.equal(opened.base_model.model.classifier.weight, adapter.head["classifier.weight"])


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
