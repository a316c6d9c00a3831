"""Tells `torch.compile` to take the operations with derivatives by hand as they are, instead of tracing into them.

Their blocks are Python loops and write into parts of tensors, which Dynamo does not follow; AOTAutograd does. Not done
when they are imported, because Dynamo imports Triton.
"""

from __future__ import annotations

from functools import cache

import torch

from ofa_kernels.fused import attention_moments, attention_trace, mlp_trace, norm_trace, squared_norm


@cache
def allow_in_graphs() -> None:
    """Let the fused operations be parts of a graph, for the rest of the process; a second call does nothing."""
    for function in (
        attention_moments._AttentionMoments,
        attention_trace._AttentionTrace,
        mlp_trace._MlpTrace,
        norm_trace._NormTrace,
        squared_norm._SquaredNorm,
    ):
        torch.compiler.allow_in_graph(function)
