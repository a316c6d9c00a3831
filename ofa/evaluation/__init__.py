"""Score label words with a causal model and measure the predictions; tokenization and prefix cache."""

from ofa.evaluation.scores import CompletionMetrics, Metrics

__all__ = ["CompletionMetrics", "Metrics"]
