"""Norm scales against LoRA on an encoder, each with its head: a table for docs/encoders.md.

    python -m benchmarks.encoders MODEL TASKS --seeds 42,43,44 --out benchmarks/results/encoders_cpu.csv

MODEL is an encoder's folder, such as all-MiniLM-L6-v2, and TASKS a folder with a folder of data for each task. Rows
that are in the file are kept; only missing ones are measured.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd

import ofa
from ofa.tasks import class_balanced

METHODS: dict[str, dict[str, Any]] = {
    "norm-tuning": {},
    "lora": {"method": "lora"},
}
SHOTS, TESTED = 5, 150


def main() -> None:
    """Measure what is missing and print the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--seeds", default="42,43,44")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/encoders_cpu.csv"))
    given = parser.parse_args()
    loaded = ofa.load_model(given.model, device="cpu")
    rows = pd.read_csv(given.out).to_dict("records") if given.out.exists() else []
    known = {(row["task"], row["seed"], row["method"]) for row in rows}
    for seed in map(int, given.seeds.split(",")):
        for folder in sorted(given.tasks.glob("*/")):
            data = ofa.load_task(str(folder))
            for name, how in METHODS.items():
                if (folder.name, seed, name) not in known:
                    rows.append(
                        {"task": folder.name, "seed": seed, "method": name, **measured(loaded, data, seed, how)}
                    )
                    pd.DataFrame(rows).to_csv(given.out, index=False)
    found = pd.DataFrame(rows).groupby(["method", "task"])[["accuracy", "nll", "cpu_seconds"]].mean()
    print(found.round(3).to_string())


def measured(loaded: Any, data: Any, seed: int, how: dict[str, Any]) -> dict[str, float]:
    """Accuracy and likelihood after one adaptation, its processor time, and the number of trained parameters."""
    started = time.process_time()
    adaptation = ofa.adapt(loaded.model, loaded.tokenizer, data, SHOTS, seed, **how)
    seconds = time.process_time() - started
    found = adaptation.evaluate(class_balanced(data.test, data.task.labels, TESTED, 42)).metrics
    count = adaptation.predictor.trainable_parameters
    adaptation.close()
    return {
        "accuracy": round(found.accuracy, 4),
        "nll": round(found.negative_log_likelihood, 4),
        "cpu_seconds": round(seconds, 1),
        "parameters": count,
    }


if __name__ == "__main__":
    main()
