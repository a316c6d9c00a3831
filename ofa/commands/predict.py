"""`ofa predict`: label new texts with an adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ofa.commands.console import reports_errors, show, show_json, tell_truncated
from ofa.commands.options import (
    BatchOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OfflineOption,
    ThreadsOption,
    TrustOption,
    set_threads,
)
from ofa.errors import InputError


@reports_errors
def predict(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder that `ofa fit` wrote.")],
    text: Annotated[list[str] | None, typer.Option(help="A text to label; may be given several times.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file with one text per line; - reads standard input.")] = None,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    batch_size: BatchOption = 16,
    offline: OfflineOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Label new texts with an adapter, with a probability for each label.

    Example: ofa predict adapter --text "a tedious film" --json
    """
    texts = [*(text or []), *(_lines(file) if file else [])]
    if not texts:
        raise InputError(f"there is no text to label{f' in {file}' if file else ''}; give --text or --file")

    from ofa.commands.adapted import open_adapter
    from ofa.evaluation import Scorer

    set_threads(threads)
    subject = open_adapter(
        adapter, model, dtype=dtype, device=device, offline=offline, trust_remote_code=trust_remote_code
    )
    scorer = Scorer(subject.model, subject.tokenizer, subject.task, batch_size=batch_size)
    if subject.task.open_ended:
        answers: list[dict[str, Any]] = [
            {"text": one, "completion": completion}
            for one, completion in zip(texts, scorer.generate(texts), strict=True)
        ]
    else:
        rows = scorer.predict_proba(texts).tolist()
        answers = [_answer(one, row, subject.task.labels) for one, row in zip(texts, rows, strict=True)]
    tell_truncated(scorer.truncated)
    if as_json:
        show_json(answers)
    else:
        _show(answers)


def _answer(text: str, row: list[float], labels: tuple[str, ...]) -> dict[str, Any]:
    best = max(range(len(labels)), key=row.__getitem__)
    return {"text": text, "label": labels[best], "probabilities": dict(zip(labels, row, strict=True))}


def _lines(file: Path) -> list[str]:
    from ofa.files import reason

    try:
        content = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file} cannot be read ({reason(error)}); give a UTF-8 text file with one text per line"
        ) from error
    return [line for line in content.splitlines() if line.strip()]


def _show(answers: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    columns = ("completion",) if "completion" in answers[0] else ("label", "probability")
    for name in (*columns, "text"):
        table.add_column(name)
    for answer in answers:
        cells = [answer.get("completion") or answer["label"]]
        if "label" in answer:
            cells.append(f"{answer['probabilities'][answer['label']]:.3f}")
        table.add_row(*(Text(cell) for cell in (*cells, answer["text"])))
    show(table)
