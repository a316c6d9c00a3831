"""Render a report as JSON values: the unrounded numbers of its tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ofa.files import Json
from ofa.report import verdicts
from ofa.report.content import Comparison, Content, Line


def summary(content: Content) -> dict[str, object]:
    """Every number of the report; accuracies and differences are shares between 0 and 1."""
    return {
        "title": verdicts.title(content),
        "finished": content.finished,
        "commands": list(content.commands),
        "versions": [{"cells": count, **found} for found, count in content.versions],
        "waiting": content.waiting,
        "comparisons": [_comparison(comparison) for comparison in content.comparisons],
    }


def _comparison(comparison: Comparison) -> dict[str, object]:
    return {
        "model": comparison.model,
        "tasks": [{"name": comparison.names[problem], **asdict(problem)} for problem in comparison.problems],
        "seeds": list(comparison.seeds),
        "cells": comparison.cells,
        "verdicts": [*verdicts.best(comparison), *verdicts.terms(comparison)],
        "rows": [_line(line, comparison) for line in comparison.lines],
        "gaps": [
            {
                "row": gap.name,
                "task": comparison.names[gap.draw.problem],
                "seed": gap.draw.seed,
                "error": gap.error,
            }
            for gap in comparison.gaps
        ],
    }


def _line(line: Line, comparison: Comparison) -> dict[str, object]:
    row = line.row
    return {
        "row": row.name,
        "method": row.method,
        "settings": dict(sorted(row.settings)),
        "context": row.context,
        "cells": len(line.accuracy),
        "accuracy": _values(line.macro),
        "macro_f1": _values(line.macro_f1),
        "tasks": {comparison.names[problem]: asdict(spread) for problem, spread in line.tasks.items()},
        "seeds": {str(seed): value for seed, value in line.by_seed.items()},
        "rank": _values(line.rank),
        "cost": _values(line.cost),
        "against": {
            method: {"row": contrast.baseline.name, **asdict(contrast.difference), "fit_time": contrast.fit_time}
            for method, contrast in line.contrasts.items()
        },
    }


def _values(value: Any) -> Json | None:
    return None if value is None else asdict(value)
