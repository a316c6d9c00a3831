"""Rate and memory of `ofa predict --data` on a large file, and the rate of `ofa evaluate` on the same rows.

python -m benchmarks.predicting --out benchmarks/results/predicting_cpu.csv

The model is a tiny Llama with random weights, saved to disk with an adapter, so that the rest dominates: the
reader, the template, the tokenizer, the batches, the writer. `--model` sets another one. Every figure is of a
separate process with its start; processor time is stated with wall-clock time, since other work on the machine affects
it less.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.table import commit, cpu, writing

TEMPLATE = "Review: {text}\nSentiment:"
LABELS = ("negative", "positive")
WORDS = ("a", "the", "film", "plot", "warm", "dull", "funny", "slow", "and", "far", "too", "long", "never", "drags")


@dataclass(frozen=True)
class Row:
    """One process."""

    command: str
    rows: int
    seconds: float
    processor_seconds: float
    rows_per_processor_second: float
    peak_memory_mb: float
    model: str
    cpu: str
    commit: str


def main() -> None:
    """Write the file and measure the commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--compared", type=int, default=50_000, help="rows that predict and evaluate are compared on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="a model folder; without it a tiny one with random weights")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, writing(options.out, Row) as write:
        folder = Path(place)
        model = Path(options.model) if options.model else tiny_model(folder / "model")
        adapter = save_adapter(model, folder / "adapter")
        few, many = (write_rows(folder / f"{rows}.csv", rows) for rows in (options.compared, options.rows))
        for _ in range(options.rounds):
            write(_measured("evaluate", model, options.compared, adapter, "--data", few, "--json"))
            write(_measured("predict", model, options.compared, adapter, "--data", few, "--out", out_of(folder)))
        write(_measured("predict", model, options.rows, adapter, "--data", many, "--out", out_of(folder)))


def tiny_model(folder: Path) -> Path:
    """A Llama of two layers with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS), TEMPLATE, *(f" {label}" for label in LABELS)] * 2, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=512, **sizes)).save_pretrained(folder)
    return folder


def save_adapter(model: Path, folder: Path) -> Path:
    """The model's own scales as an adapter of the task."""
    import ofa
    from ofa.models.load import load_model

    loaded = load_model(str(model))
    ofa.tune_norms(loaded.model)
    task = ofa.Task("reviews", TEMPLATE, LABELS)
    return ofa.save_adapter(loaded.model, folder, base_model=str(model.absolute()), details={"task": task.to_dict()})


def write_rows(file: Path, rows: int) -> Path:
    """A CSV file of texts of 5 to 40 words."""
    generator = random.Random(0)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "text", "label"])
        for row in range(rows):
            text = " ".join(generator.choices(WORDS, k=generator.randint(5, 40)))
            writer.writerow([row, text, LABELS[row % 2]])
    return file


def out_of(folder: Path) -> Path:
    """The file for predictions; an existing one is removed."""
    out = folder / "predictions.csv"
    out.unlink(missing_ok=True)
    return out


def _measured(command: str, model: Path, rows: int, *arguments: object) -> list[Row]:
    """Run a command; returns its times and peak memory."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "ofa", command, *map(str, arguments), "--offline"], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    processor = usage.ru_utime + usage.ru_stime
    return [
        Row(
            command=command,
            rows=rows,
            seconds=round(time.perf_counter() - start, 1),
            processor_seconds=round(processor, 1),
            rows_per_processor_second=round(rows / processor),
            peak_memory_mb=round(usage.ru_maxrss / 1024),
            model=model.name,
            cpu=cpu(),
            commit=commit(),
        )
    ]


if __name__ == "__main__":
    main()
