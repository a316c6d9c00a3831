"""What labelling the texts that `ofa suggest` chooses gains, against as many texts drawn at random.

python -m benchmarks.suggesting --out benchmarks/results/suggesting_cpu.jsonl

For every task and seed a model is fitted to a few shots per class. It chooses texts from the rest of the training
examples; their labels are revealed, and the bare model is fitted to the shots and these texts. The same is done with
texts drawn at random. Each finished draw is a line of the file, and a second run computes only the missing ones. Then
the table between `<!-- suggesting -->` and `<!-- end -->` in docs/choosing.md is written.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ofa
from benchmarks.draws import completed, fill
from benchmarks.table import commit
from ofa.adaptation import Adaptation
from ofa.comparison.outcomes import Draw, Problem
from ofa.methods.active_learning import choose
from ofa.models.load import LoadedModel, load_model
from ofa.report.formatting import percent, plural, points, points_interval
from ofa.report.statistics import Difference, paired_difference
from ofa.tasks import DEMO_TASKS, Example, TaskData, class_balanced, few_shot, load_demo_task, unused

SHOTS, SUGGESTED, RANDOM = "shots", "suggested", "random"


@dataclass(frozen=True)
class Line:
    """One draw: the scores of the shots alone and of the shots with the texts of either choice, by arm."""

    model: str
    task: str
    seed: int
    shots: int
    added: int
    test_size: int
    accuracy: Mapping[str, float]
    likelihood: Mapping[str, float]
    classes: Mapping[str, Mapping[str, int]]
    commit: str

    @property
    def draw(self) -> Draw:
        """What makes two arms comparable."""
        return Draw(Problem(self.task, self.shots, self.test_size, ""), self.seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the missing draws, and write the table into the page."""
    options = _parser().parse_args(arguments)
    loaded = load_model(options.model, device="cpu")
    settings = {"max_steps": options.max_steps} if options.max_steps else {}

    def one(task: str, seed: int) -> Line:
        return measured(loaded, task, seed, options.shots, options.add, options.test_size, settings)

    lines = completed(options.out, Line, options.tasks, options.seeds, one)
    print(table(lines))
    if options.page:
        fill(options.page, "suggesting", table(lines))


def measured(
    loaded: LoadedModel, task: str, seed: int, shots: int, add: int, test_size: int, settings: Mapping[str, int]
) -> Line:
    """Fit the shots alone, then the shots with the texts of either choice."""
    data = load_demo_task(task)
    drawn = few_shot(data.train, data.task.labels, shots, seed)
    rest = unused(data.train, drawn)
    tested = class_balanced(data.test, data.task.labels, test_size, seed)
    added: dict[str, Sequence[Example]] = {RANDOM: random.Random(seed).sample(rest, add), SHOTS: ()}
    scores = {}
    with fitted(loaded, data, drawn.examples, seed, settings) as adaptation:
        scores[SHOTS] = adaptation.evaluate(tested).metrics
        chosen = choose(adaptation.predictor.scorer, [example.text for example in rest], add)
        added[SUGGESTED] = [rest[choice.index] for choice in chosen]
    for arm in (SUGGESTED, RANDOM):
        with fitted(loaded, data, (*drawn.examples, *added[arm]), seed, settings) as adaptation:
            scores[arm] = adaptation.evaluate(tested).metrics
    return Line(
        model=loaded.name,
        task=task,
        seed=seed,
        shots=shots,
        added=add,
        test_size=len(tested),
        accuracy={arm: score.accuracy for arm, score in scores.items()},
        likelihood={arm: score.negative_log_likelihood for arm, score in scores.items()},
        classes={arm: dict(Counter(example.label for example in examples)) for arm, examples in added.items()},
        commit=commit(),
    )


@contextmanager
def fitted(
    loaded: LoadedModel, data: TaskData, train: Sequence[Example], seed: int, settings: Mapping[str, int]
) -> Iterator[Adaptation]:
    """The model fitted to these examples, and afterwards as it was."""
    subset = TaskData(data.task, tuple(train))
    adaptation = ofa.adapt(loaded.model, loaded.tokenizer, subset, "all", seed, **settings)
    try:
        yield adaptation
    finally:
        adaptation.close()


def table(lines: Sequence[Line]) -> str:
    """A row per task and one for all: mean accuracies, and what the suggested texts gained on random ones."""
    rows = [
        "| | shots alone | with suggested texts | with random texts | suggested − random, points | better / worse |",
        "|---|---|---|---|---|---|",
    ]
    tasks = sorted({line.task for line in lines})
    groups = {**{task: [line for line in lines if line.task == task] for task in tasks}, "all": lines}
    return "\n".join([*rows, *(_row(name, group) for name, group in groups.items())]) + "\n"


def gained(lines: Sequence[Line]) -> Difference | None:
    """The accuracy of the suggested texts minus that of random ones, paired by draw."""
    by_arm = [{line.draw: line.accuracy[arm] for line in lines} for arm in (SUGGESTED, RANDOM)]
    return paired_difference(*by_arm)


def _row(name: str, lines: Sequence[Line]) -> str:
    means = [percent(sum(line.accuracy[arm] for line in lines) / len(lines)) for arm in (SHOTS, SUGGESTED, RANDOM)]
    difference = gained(lines)
    assert difference is not None
    # Fewer pairs than paired intervals need have none.
    ends = f" {points_interval(difference.interval)}" if difference.pairs >= 6 else ""
    counts = f"{difference.wins} / {difference.losses} of {plural(difference.pairs, 'draw')}"
    return f"| {' | '.join([name, *means, points(difference.mean) + ends, counts])} |"


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True, help="file of finished draws, one JSON line each")
    found.add_argument("--page", type=Path, help="page to write the table into, such as docs/choosing.md")
    found.add_argument("--model", help="hub id or folder; the embedded SmolLM2-135M-Instruct without it")
    found.add_argument("--tasks", nargs="+", default=list(DEMO_TASKS), help="embedded tasks")
    found.add_argument("--seeds", nargs="+", type=int, default=[42, 43], help="draws of the shots")
    found.add_argument("--shots", type=int, default=2, help="labelled examples per class at the start")
    found.add_argument("--add", type=int, default=10, help="texts to label")
    found.add_argument("--test-size", type=int, default=200, help="class-balanced test examples")
    found.add_argument("--max-steps", type=int, help="optimizer steps; without it those of `ofa fit`")
    return found


if __name__ == "__main__":
    main()
