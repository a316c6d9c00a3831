"""`ofa predict` of files: every row keeps its columns and gets its answer, and a stopped run can resume."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ofa.command_line import TEMPLATE, TRAIN, done, names, ofa, write_rows

TEXTS = ["a warm film", "", "two\u2028lines\x85of one text", 'with "quotes", and\r commas; \x1e', "\ufeffmarked"]


@dataclass(frozen=True)
class Bench:
    """A folder with an adapter of one column and one of two."""

    here: Path
    adapter: Path
    pair_adapter: Path


@pytest.fixture(scope="module")
def adapters(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    rows = [(f"about {text}", text, label) for text, label in TRAIN]
    train = write_rows(folder / "train.jsonl", rows, ("premise", "text", "label"))
    given = ["--data", train, "--model", tiny_folder, "--shots", 2, "--epochs", 1]
    done("fit", *given, "--template", TEMPLATE, "--out", folder / "one")
    told = done("fit", *given, "--template", r"{premise}\nHypothesis: {text}\nLabel:", "--out", folder / "two").err
    assert f"try: ofa predict {folder / 'two'} --data FILE" in told
    return folder


@pytest.fixture
def bench(adapters: Path, tmp_path: Path) -> Bench:
    return Bench(tmp_path, adapters / "one", adapters / "two")


def write_csv(file: Path, header: list[str], rows: list[list[str]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return file


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, strict=True))


def read_jsonl(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def label_of(bench: Bench, text: str) -> object:
    return done("predict", bench.adapter, f"--text={text}", "--json").json[0]["label"]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_row_has_its_columns_its_label_and_a_probability_of_each_label(bench: Bench, form: str) -> None:
    """Also a row without text, a text with every kind of separator, and existing gold labels."""
    data = write_csv(
        bench.here / "in.csv", ["id", "Text", "label"], [[str(i), text, "gold"] for i, text in enumerate(TEXTS)]
    )
    out = bench.here / f"out.{form}"
    told = done("predict", bench.adapter, "--data", data, "--out", out, "--batch-size", 1).err
    rows = read_csv(out) if form == "csv" else read_jsonl(out)
    assert [(row["id"], row["Text"], row["label"]) for row in rows] == [
        (str(i), t, "gold") for i, t in enumerate(TEXTS)
    ]
    assert "1 of the 5 rows have no text" in told
    assert rows[1]["predicted_label"] in ("", None)
    for index in (0, 2, 3, 4):
        each = _probabilities(rows[index], form)
        assert sum(each.values()) == pytest.approx(1)
        assert rows[index]["predicted_label"] == max(each, key=each.__getitem__) == label_of(bench, TEXTS[index])
    assert names(bench.here) == {"in.csv", out.name}


def _probabilities(row: dict, form: str) -> dict[str, float]:
    if form == "jsonl":
        return row["probabilities"]
    return {name.removeprefix("probability_"): float(row[name]) for name in row if name.startswith("probability_")}


def test_a_text_file_is_lines_ended_by_a_line_feed(bench: Bench) -> None:
    """A byte-order mark is stripped, only line feeds end a text, and blank lines are rows."""
    file = bench.here / "texts.txt"
    file.write_bytes("\ufeffone\r\n\ntwo\u2028a\x0bb\n".encode())
    answers = done("predict", bench.adapter, "--data", file, "--json").json
    assert [answer["text"] for answer in answers] == ["one", "", "two\u2028a\x0bb"]
    assert [answer["label"] is None for answer in answers] == [False, True, False]
    assert answers[0]["label"] == label_of(bench, "one")


def test_an_adapter_of_several_columns_needs_them_by_name(bench: Bench) -> None:
    data = write_rows(bench.here / "in.jsonl", [("a", "b")], ("Premise", "text"))
    answer = done("predict", bench.pair_adapter, "--data", data, "--json").json[0]
    assert list(answer) == ["Premise", "text", "label", "probabilities"]
    lacking = write_rows(bench.here / "lacking.jsonl", [("b", "c")], ("text", "other"))
    for given, words in (
        (["--data", lacking], 'lacking.jsonl, line 1 has no column "premise" (columns found: "text", "other")'),
        (["--text", "b"], "--text gives texts without columns"),
        (["--data", "-"], "has the columns premise and text: give --data with a file of these columns"),
    ):
        refused = ofa("predict", bench.pair_adapter, *given, stdin="b\n")
        assert refused.status == 2
        assert words in refused.err


def test_evaluate_reads_the_columns_of_the_adapter(bench: Bench) -> None:
    rows = [(f"about {text}", text, label) for text, label in TRAIN]
    data = write_rows(bench.here / "test.jsonl", rows, ("premise", "body", "kind"))
    given = ["evaluate", bench.pair_adapter, "--data", data, "--text-column", "body", "--label-column", "kind"]
    assert done(*given, "--json").json["count"] == len(TRAIN)
    assert ofa(*given[:4]).status == 2


def stopped(bench: Bench, patch: pytest.MonkeyPatch, data: Path, out: Path, parts: int) -> None:
    """Run a prediction that Ctrl-C stops after this many parts of two rows."""
    from ofa.commands.predictions import PredictionFile

    append, left = PredictionFile.append, iter(range(parts))

    def interrupted(self, rows, answers):
        if next(left, None) is None:
            self._file.write(b"half a li")
            raise KeyboardInterrupt
        append(self, rows, answers)

    patch.setattr("ofa.commands.predict._BATCHES", 1)
    with patch.context() as patched:
        patched.setattr(PredictionFile, "append", interrupted)
        finished = ofa("predict", bench.adapter, "--data", data, "--out", out, "--batch-size", 2)
    assert finished.status == 130
    assert f"stopped with {2 * parts} of 5 rows written; the same command with --resume continues" in finished.err


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("parts", [0, 2])
def test_a_stopped_run_continues_to_the_same_file(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, form: str, parts: int
) -> None:
    data = write_csv(bench.here / "in.csv", ["text"], [[f"text {n}"] for n in range(5)])
    out, whole = bench.here / f"out.{form}", bench.here / f"whole.{form}"
    command = ["predict", bench.adapter, "--data", data, "--batch-size", 2]
    stopped(bench, monkeypatch, data, out, parts)
    done(*command, "--out", whole)
    assert not out.exists()
    if parts:
        assert "belongs to a run that was stopped: pass --resume" in ofa(*command, "--out", out).err
    done(*command, "--out", out, "--resume")
    assert out.read_bytes() == whole.read_bytes()
    assert names(bench.here) == {data.name, out.name, whole.name}
    assert "exists already" in ofa(*command, "--out", out, "--resume").err
    assert names(bench.here) == {data.name, out.name, whole.name}
    done(*command, "--out", out, "--overwrite")


def test_a_run_resumes_only_with_the_same_settings_and_data(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_csv(bench.here / "in.csv", ["text"], [[f"text {n}"] for n in range(5)])
    out = bench.here / "out.csv"
    stopped(bench, monkeypatch, data, out, 1)
    command = ["predict", bench.adapter, "--data", data, "--out", out, "--resume"]
    assert "was started with another dtype" in ofa(*command, "--dtype", "bfloat16").err
    write_csv(data, ["text"], [["another"], *([f"text {n}"] for n in range(1, 5))])
    assert "the data differs from" in ofa(*command).err
    assert read_csv(out.with_name(".out.csv.partial")) != []


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("out.txt", "end it in .csv or .jsonl"),
        ("none/out.csv", "in an existing folder"),
        (".", "end it in"),
        ("there.csv", "exists already"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_first(bench: Bench, out: str, words: str) -> None:
    (bench.here / "there.csv").touch()
    refused = ofa("predict", bench.here / "no adapter", "--data", "none.csv", "--out", bench.here / out)
    assert refused.status == 2
    assert words in refused.err


def test_a_broken_row_at_the_end_is_refused_before_anything_is_written(bench: Bench) -> None:
    data = bench.here / "in.csv"
    data.write_text("text,id\n" + "a,1\n" * 3000 + "b\n", encoding="utf-8")
    refused = ofa("predict", bench.adapter, "--data", data, "--out", bench.here / "out.csv")
    assert "in.csv, line 3002 has 1 cells but the header has 2" in refused.err
    assert names(bench.here) == {"in.csv"}
