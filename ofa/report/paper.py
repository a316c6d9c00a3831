"""Look up the paper's own results for a model, each with its source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ofa.files import Json


@dataclass(frozen=True)
class PaperResult:
    """One accuracy of the paper, between 0 and 1; `context` is None if it is not known."""

    task: str
    method: str
    context: str | None
    accuracy: float
    source: str


@dataclass(frozen=True)
class Paper:
    """The paper's results for one model, under the paper's name of the model."""

    citation: str
    protocol: str
    model: str
    results: tuple[PaperResult, ...]


def paper_results(model: str) -> Paper | None:
    """The paper's results for a model by hub id or folder; None for a model that the paper does not report.

    Names are compared without owner and case: a copy of the same weights counts, a chat-tuned variant does not.
    """
    data = _data()
    name = model.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1].casefold()
    known = next((paper for paper, names in data["models"].items() if name in map(str.casefold, names)), None)
    if known is None:
        return None
    rows = [
        {key: value for key, value in row.items() if key != "model"} for row in data["results"] if row["model"] == known
    ]
    return Paper(data["paper"], data["protocol"], known, tuple(PaperResult(**row) for row in rows))


@cache
def _data() -> Json:
    content: dict[str, object] = json.loads(files("ofa.report").joinpath("paper.json").read_text(encoding="utf-8"))
    return content
