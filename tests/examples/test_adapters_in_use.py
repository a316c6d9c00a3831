"""The examples of adapters in use, run small: every way to load an adapter gives the same answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import ofa
from ofa.evaluation.scorer import evaluate
from tests.examples.test_loops import example

# PEFT warns of every norm, and tunes it anyway.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")

WAYS = ["PeftModel.from_pretrained", "AutoPeftModelForCausalLM", "model.load_adapter", "merged checkpoint"]


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    """An adapter whose answers are far from those of its base."""
    loaded = ofa.load_model(str(tiny_folder))
    with torch.no_grad():
        for index, scale in enumerate(ofa.tune_norms(loaded.model)):
            scale.add_(torch.linspace(-0.5, 0.7, scale.numel()).roll(7 * index))
    return ofa.save_adapter(loaded.model, tmp_path / "adapter")


def opened(
    adapter: Path, out: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, float], list[str]]:
    """The distances that the example prints, and the texts of the two pipelines."""
    example("open_adapter").main([str(adapter), "--dtype", dtype, "--out", str(out)])
    printed = capsys.readouterr().out
    distances = {name.strip(): float(value) for name, value in re.findall(r"(?m)^(.{26}) (\S+e\S+)", printed)}
    return distances, re.findall(r"(?m)^pipeline on \S+: (.+)$", printed)


def test_everything_opens_an_adapter_and_answers_the_same(adapter: Path, tmp_path: Path, capsys) -> None:
    """Bit-identical in float32, and different from the base."""
    distances, written = opened(adapter, tmp_path / "checkpoint", "float32", capsys)
    assert {name: distances[name] for name in WAYS} == dict.fromkeys(WAYS, 0.0)
    assert distances["the base without it"] > 0.1
    assert len(written) == 2
    assert written[0] == written[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_all_round_the_scales_alike(dtype: str, adapter: Path, tmp_path: Path, capsys) -> None:
    """PEFT and the merged checkpoint round the scales once; the adapter in use has them in float32."""
    distances, written = opened(adapter, tmp_path / "checkpoint", dtype, capsys)
    assert len({distances[name] for name in WAYS}) == 1
    # Rounding is visible, and small relative to the adapter's effect.
    assert 0 < distances["merged checkpoint"] < 0.1 * distances["the base without it"]
    assert written[0] == written[1]


SINGLE_TOKENS, SHARED_FIRST_TOKEN = ("a", "the"), ("film", "film and")


@pytest.mark.parametrize(
    ("labels", "options"),
    [(SINGLE_TOKENS, []), (SHARED_FIRST_TOKEN, ["--line-end"])],
    ids=["single tokens", "a shared first token"],
)
def test_the_harness_measures_what_we_measure(
    labels: tuple[str, str],
    options: list[str],
    adapter: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the merged model, by the log-likelihoods of words that the harness knows, prediction by prediction."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "task"
    folder.mkdir()
    task = {"name": "words", "template": "Review: {text}\nSentiment:", "labels": labels}
    (folder / "task.json").write_text(json.dumps(task))
    texts = [
        "a warm film",
        "dull {{prompt}} {%",
        "it never drags, ever",
        "so long",
        "the bank",
        "Paris | 12",
        "x",
        "19 + 7",
    ]
    rows = [{"text": text, "label": labels[index % 2]} for index, text in enumerate(texts)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    example("lm_evaluation/write_task").main([str(folder), "--out", str(tmp_path / "harness"), *options])

    merged = ofa.merge(str(tiny_folder), adapter, tmp_path / "checkpoint")
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(merged), "dtype": "float32"},
        tasks=["ofa_words"],
        task_manager=TaskManager(include_path=str(tmp_path / "harness"), include_defaults=False),
        batch_size=3,
        device="cpu",
        bootstrap_iters=0,
    )
    loaded = ofa.load_model(str(tiny_folder), device="cpu")
    ofa.load_adapter(loaded.model, adapter)
    data = ofa.load_task(folder)
    own = evaluate(loaded.model, loaded.tokenizer, data.task, data.test)

    samples = sorted(found["samples"]["ofa_words"], key=lambda sample: sample["doc_id"])
    theirs = torch.tensor([[float(score) for score, _ in sample["filtered_resps"]] for sample in samples])
    # Both compute in float32; normalised over the labels, these differ by rounding in another batch and padding.
    torch.testing.assert_close(theirs.softmax(1), own.probabilities, rtol=0, atol=1e-5)
    assert [labels[index] for index in theirs.argmax(1).tolist()] == list(own.predictions)
    assert found["results"]["ofa_words"]["acc,none"] == own.metrics.accuracy
    assert 0 < own.metrics.accuracy < 1
