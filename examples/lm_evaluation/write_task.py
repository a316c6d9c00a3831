"""Writes a task of this package as a task of lm-evaluation-harness: the same prompts and label words, in local files.

    ofa merge adapter --out checkpoint
    python examples/lm_evaluation/write_task.py reviews --out harness
    lm_eval run --model hf --model_args pretrained=checkpoint,dtype=float32 \\
        --include_path harness --tasks ofa_reviews --batch_size 16

The harness compares the log-likelihoods of " label" after the prompt, and its `acc` is the accuracy of `ofa evaluate`
if each label is one token. For longer labels `ofa evaluate` compares first tokens, or, if two labels share one, whole
words with their line end, as the harness does with `--line-end`. If a text does not fit the model's window, `ofa
evaluate` shortens the text, and the harness cuts the prompt from the left. HF_HUB_OFFLINE=1 keeps it off the network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import ofa
from ofa.tasks import Example, Task


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the task's YAML file and its examples."""
    options = parser().parse_args(arguments)
    data = ofa.load_task(options.task)
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"ofa_{data.task.name}"
    rows = folder / f"{name}.jsonl"
    rows.write_text("".join(json.dumps(row(data.task, example)) + "\n" for example in data.test), encoding="utf-8")
    configuration = harness_task(name, data.task, rows, "\n" if options.line_end else "")
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(configuration, sort_keys=False), encoding="utf-8")
    print(f"{len(data.test)} examples of {data.task.name}: {folder / name}.yaml")


def row(task: Task, example: Example) -> dict[str, Any]:
    """An example with its template applied, so that the harness does not interpret braces in texts."""
    return {"prompt": task.prompt(example.text), "label": task.labels.index(example.label)}


def harness_task(name: str, task: Task, rows: Path, end: str) -> dict[str, Any]:
    """The task in the harness's format: multiple choice between the label words, each followed by `end`."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": [label + end for label in task.labels],
        "doc_to_target": "label",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("task", help="demo task, task of the paper, or folder with task.json")
    found.add_argument("--out", type=Path, default=Path("harness"), help="folder for the task's files")
    found.add_argument("--line-end", action="store_true", help="for labels that share their first token")
    return found


if __name__ == "__main__":
    main()
