"""Score label words with a causal model and measure the predictions; tokenization and prefix cache."""

from ofa.evaluation.scorer import CompletionMetrics, Evaluation, Metrics, Mode, Progress, Scorer, evaluate, metrics
from ofa.models.introspection import evaluating

__all__ = [
    "CompletionMetrics",
    "Evaluation",
    "Metrics",
    "Mode",
    "Progress",
    "Scorer",
    "evaluate",
    "evaluating",
    "metrics",
]
