"""Measurements of single draws of shots, one JSON line each, so that a stopped run continues; their table in a page."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from ofa.comparison.plan import TEST_SEED
from ofa.models.load import LoadedModel, load_model
from ofa.tasks import DEMO_TASKS, Example, TaskData, class_balanced, few_shot, load_task

L = TypeVar("L")
"""A dataclass with fields `task`, the name without its folder, and `seed`."""


def read(file: Path, line: type[L]) -> list[L]:
    """The finished draws of a file; none if it does not exist."""
    if not file.exists():
        return []
    return [line(**json.loads(text)) for text in file.read_text(encoding="utf-8").splitlines()]


def completed(
    file: Path, line: type[L], tasks: Iterable[str], seeds: Iterable[int], measured: Callable[[str, int], Any]
) -> list[L]:
    """All draws of the file, after those that it lacked were measured and added one by one."""
    done = {(known.task, known.seed) for known in read(file, line)}  # type: ignore[attr-defined]
    for task, seed in [(task, seed) for seed in seeds for task in tasks]:
        if (Path(task).name, seed) not in done:
            found = json.dumps(asdict(measured(task, seed)))
            with file.open("a", encoding="utf-8") as stream:
                stream.write(found + "\n")
    return read(file, line)


def drawn(
    task: str, shots: int, seed: int, test_size: int
) -> tuple[TaskData, tuple[Example, ...], tuple[Example, ...]]:
    """A task, the shots of a seed, and its class-balanced test examples, as `ofa compare` draws them."""
    data = load_task(task)
    tested = class_balanced(data.test, data.task.labels, test_size, TEST_SEED)
    return data, few_shot(data.train, data.task.labels, shots, seed).examples, tuple(tested)


def run(
    name: str,
    description: str | None,
    line: type[L],
    measured: Callable[[LoadedModel, str, int, int, int, dict[str, int]], L],
    table: Callable[[list[L]], str],
    arguments: Sequence[str] | None,
) -> None:
    """Compute the missing draws by `measured(model, task, seed, shots, test size, settings)`, and fill the page."""
    options = parser(description).parse_args(arguments)
    loaded = load_model(options.model, dtype=options.dtype, device="cpu")
    settings = {"max_steps": options.max_steps} if options.max_steps else {}

    def one(task: str, seed: int) -> L:
        return measured(loaded, task, seed, options.shots, options.test_size, settings)

    lines = completed(options.out, line, options.tasks, options.seeds, one)
    print(table(lines))
    if options.page:
        fill(options.page, name, table(lines))


def fill(page: Path, name: str, table: str) -> None:
    """Write a table between `<!-- name -->` and `<!-- end -->`."""
    place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    text = place.sub(lambda found: found[1] + table + found[2], page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a command that measures draws and fills a page."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True, help="file of finished draws, one JSON line each")
    found.add_argument("--page", type=Path, help="page to write the table into, such as docs/studies.md")
    found.add_argument("--model", help="hub id or folder; the embedded SmolLM2-135M-Instruct without it")
    found.add_argument("--dtype", default="bfloat16", help="dtype of the model, by default that of the studies")
    found.add_argument("--tasks", nargs="+", default=list(DEMO_TASKS), help="embedded tasks, or folders with task.json")
    found.add_argument("--seeds", nargs="+", type=int, default=[42], help="draws of the shots")
    found.add_argument("--shots", type=int, default=5, help="labelled examples per class")
    found.add_argument("--test-size", type=int, default=200, help="class-balanced test examples")
    found.add_argument("--max-steps", type=int, help="optimizer steps; without it those of `ofa fit`")
    return found
