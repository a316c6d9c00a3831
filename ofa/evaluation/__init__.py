"""Score label words with a causal model and measure the predictions; tokenization and prefix cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ofa._lazy import on_first_use

if TYPE_CHECKING:
    from ofa.evaluation.scorer import Evaluation as Evaluation
    from ofa.evaluation.scorer import Mode as Mode
    from ofa.evaluation.scorer import Progress as Progress
    from ofa.evaluation.scorer import Scorer as Scorer
    from ofa.evaluation.scorer import evaluate as evaluate
    from ofa.evaluation.scores import CompletionMetrics as CompletionMetrics
    from ofa.evaluation.scores import Metrics as Metrics
    from ofa.evaluation.scores import metrics as metrics
    from ofa.models.introspection import evaluating as evaluating

__all__, __getattr__, __dir__ = on_first_use(
    __name__,
    {
        "Evaluation": "ofa.evaluation.scorer",
        "Mode": "ofa.evaluation.scorer",
        "Progress": "ofa.evaluation.scorer",
        "Scorer": "ofa.evaluation.scorer",
        "evaluate": "ofa.evaluation.scorer",
        "CompletionMetrics": "ofa.evaluation.scores",
        "Metrics": "ofa.evaluation.scores",
        "metrics": "ofa.evaluation.scores",
        "evaluating": "ofa.models.introspection",
    },
)
