"""`ofa suggest`: uncertain and diverse texts to label, each once, in a file that `ofa fit` reads when filled in."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from ofa.evaluation.scorer import Scorer
from ofa.methods.active_learning import choose, farthest_first
from ofa.methods.hidden_states import last_hidden_states
from ofa.models.load import load_model
from ofa.tasks import Task
from tests.ofa.command_line import LABELS, TEMPLATE, TEST, TRAIN, done, ofa, write_rows

POOL = [text for text, _ in TEST] + ["slow", "a small town", "he meets a bore"]


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suggest")
    train = write_rows(folder / "train.jsonl", TRAIN)
    given = ["--data", train, "--model", tiny_folder, "--template", TEMPLATE, "--shots", 2, "--max-steps", 1]
    done("fit", *given, "--out", folder / "adapter")
    done("fit", *given, "--method", "lora", "--out", folder / "lora")
    return folder / "adapter"


def scorer_of(model, tokenizer) -> Scorer:
    return Scorer(model, tokenizer, Task("data", "Sentence: {text}\nLabel:", tuple(LABELS.split(","))))


def test_farthest_first_covers_the_points_and_takes_none_twice() -> None:
    points = torch.tensor([[0.0], [0.0], [1.0], [5.0], [3.0]])
    assert farthest_first(points, 3) == [0, 3, 4]
    assert sorted(farthest_first(points, 9)) == [0, 1, 2, 3, 4]


def test_the_candidates_are_the_smallest_margins_and_the_choices_far_apart(tiny_folder: Path, monkeypatch) -> None:
    loaded = load_model(str(tiny_folder))
    scorer = scorer_of(loaded.model, loaded.tokenizer)
    best = scorer.predict_proba(POOL).sort(1, descending=True).values
    by_margin = (best[:, 0] - best[:, 1]).argsort(stable=True).tolist()
    monkeypatch.setattr("ofa.methods.active_learning.POOL", 2)
    chosen = choose(scorer, POOL, 2)
    four = by_margin[:4]
    states = last_hidden_states(scorer, [POOL[index] for index in four])
    farthest = four[int((states - states[0]).norm(dim=1).argmax())]
    assert [choice.index for choice in chosen] == [four[0], farthest]
    assert chosen[0].margin == pytest.approx(float(best[four[0], 0] - best[four[0], 1]), abs=1e-6)


def test_a_file_has_each_unlabelled_text_once_and_is_training_data_when_filled_in(
    adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Left out: texts of the training file, with a label, repeated, blank. Columns are kept, also one of our names."""
    texts = [
        *((text, "", "kept") for text in POOL),
        (TRAIN[0][0], "", ""),
        (POOL[0], "", ""),
        ("done", "objective", ""),
    ]
    data = write_rows(tmp_path / "in.jsonl", [*texts, (" ", "", "")], ("text", "label", "reason"))  # type: ignore[arg-type]
    out = tmp_path / "out.csv"
    given = ["suggest", "--data", data, "--adapter", adapter, "-n", 4, "--out", out]
    told = done(*given, "--labelled", adapter.parent / "train.jsonl").err
    with out.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, strict=True))
    assert list(rows[0]) == ["text", "label", "reason", "predicted_label", "probability", "margin", "suggested_reason"]
    assert len({row["text"] for row in rows}) == 4
    assert {row["text"] for row in rows} <= set(POOL)
    assert {(row["label"], row["reason"]) for row in rows} == {("", "kept")}
    margins = [float(row["margin"]) for row in rows]
    assert f"4 of 7 texts suggested, margins {min(margins):.2f} to {max(margins):.2f}" in told
    assert "2 with labels, 1 repeated, 1 blank" in told
    assert "exists already" in ofa(*given).err
    filled = write_rows(
        tmp_path / "filled.jsonl", [(row["text"], LABELS.split(",")[i % 2]) for i, row in enumerate(rows)]
    )
    done("fit", "--data", filled, "--model", tiny_folder, "--template", TEMPLATE, "--shots", 2, "--max-steps", 1,
         "--out", tmp_path / "next")  # fmt: skip


def test_lines_of_text_without_an_adapter(tiny_folder: Path) -> None:
    """All of them if there are fewer than asked for; the first is the least certain."""
    given = ["suggest", "--data", "-", "--model", tiny_folder, "--template", TEMPLATE, "--labels", LABELS]
    rows = done(*given, "--json", stdin="\n".join(POOL)).json
    assert {row["text"] for row in rows} == set(POOL)
    assert rows[0]["margin"] == min(row["margin"] for row in rows)
    assert rows[0]["reason"].startswith("smallest margin; next is ")
    assert "unlike those above" in done(*given, stdin="\n".join(POOL)).out


def test_hidden_states_are_those_of_the_adapted_model(adapter: Path, tiny_folder: Path) -> None:
    """Of norm scales and of LoRA."""
    from ofa.adapters.open import opened_adapter
    from ofa.adapters.read import read_any_adapter

    loaded = load_model(str(tiny_folder))
    bare = last_hidden_states(scorer_of(loaded.model, loaded.tokenizer), POOL)
    for folder in (adapter, adapter.parent / "lora"):
        with opened_adapter(loaded.model, read_any_adapter(folder)) as model:
            assert not torch.equal(last_hidden_states(scorer_of(model, loaded.tokenizer), POOL), bare)


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        ("one", [], "give --adapter, or --template and --labels"),
        ("one", ["--template", TEMPLATE], "give --adapter, or --template and --labels"),
        ("one", ["--adapter", "ADAPTER", "--labels", LABELS], "brings its own template and labels"),
        (" \n", ["--adapter", "ADAPTER"], "no text to label (it is empty)"),
        ("one", ["--adapter", "ADAPTER", "--out", "x.txt"], "end it in .csv or .jsonl"),
        ("one", ["--template", "{a} {b}", "--labels", LABELS], "the template has the columns a and b"),
    ],
)
def test_refusals_come_before_the_model_is_loaded(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, lines: str, options: list[str], words: str
) -> None:
    monkeypatch.setattr("ofa.commands.adapted.open_model", None)
    refused = ofa(
        "suggest", "--data", "-", *(str(adapter) if one == "ADAPTER" else one for one in options), stdin=lines
    )
    assert (refused.status, refused.out) == (2, "")
    assert words in refused.err
