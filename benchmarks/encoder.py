"""A sentence encoder with logistic regression, as a row of the study of baselines.

    python -m benchmarks.encoder FOLDER studies/baselines.yaml studies/records/baselines

FOLDER is a model that transformers' AutoModel opens, such as all-MiniLM-L6-v2. Texts are embedded without the prompt by
the mean of the last hidden states over their tokens; `ofa.probing.linear_probe` learns the shots. Existing cells
are kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ofa.commands.options import read_mapping
from ofa.comparison.environment import library_versions, now
from ofa.comparison.grid import Grid
from ofa.comparison.plan import TaskPlan, read_tasks
from ofa.comparison.records import Cell, Record, Score
from ofa.comparison.store import opened
from ofa.evaluation.scores import metrics
from ofa.probing.linear_probe import linear_probe
from ofa.tasks import Example

Embed = Callable[[Sequence[str]], Tensor]


def main() -> None:
    """Fit and test every task and seed of the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("encoder", "grid", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    grid = Grid(**{name: value for name, value in read_mapping(given.grid).items() if name in Grid.model_fields})
    embed = encoder(given.encoder)
    with opened(given.out) as results:
        for name, task in read_tasks(grid).items():
            tested: Tensor | None = None
            for seed in grid.seeds:
                cell = Cell(given.encoder.name, name, task.sha256, "encoder", seed, grid.shots, grid.test_size, {})
                if cell.key in {record.cell.key for record in results.records}:
                    continue
                tested = embed(_texts(task.tested)) if tested is None else tested
                results.append(record(cell, task, embed, tested))


def encoder(folder: Path) -> Embed:
    """The mean of the last hidden states over a text's tokens, for each text."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> Tensor:
        rows = []
        for text in texts:
            batch = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            rows.append(model(**batch).last_hidden_state[0].mean(0))
        return torch.stack(rows)

    return embed


def record(cell: Cell, task: TaskPlan, embed: Embed, tested: Tensor) -> Record:
    """The record of one cell; `tested` are the embeddings of the task's test texts."""
    labels, shots = task.task.labels, task.drawn[cell.seed]
    started = time.perf_counter()
    known = embed(_texts(shots.examples))
    classes = torch.tensor([labels.index(shot.label) for shot in shots.examples])
    log_probabilities = linear_probe(known, classes, tested)
    seconds = time.perf_counter() - started
    truth = [example.label for example in task.tested]
    score = Score(
        metrics=metrics(log_probabilities.exp(), truth, labels).to_dict(),
        predictions=tuple(log_probabilities.argmax(1).tolist()),
        truth=tuple(labels.index(label) for label in truth),
        seconds_per_text=0.0,
        extra_tokens=0,
    )
    weights = len(labels) * (known.shape[1] + 1)
    return Record(
        cell,
        scores={"prompt": score},
        fit_seconds=round(seconds, 4),
        seconds=round(seconds, 4),
        trainable_parameters=weights,
        stored_bytes=4 * weights,
        shots_sha256=shots.sha256,
        finished=now(),
        versions=library_versions(),
    )


def _texts(examples: Sequence[Example]) -> list[str]:
    return [example.text for example in examples]


if __name__ == "__main__":
    main()
