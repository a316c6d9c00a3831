"""The specification of every operation, in plain differentiable PyTorch.

Oracle of the kernels' tests, baseline of the benchmarks, and implementation on the CPU. Tensors may have any leading
shape; the last dimension is a row. Arithmetic is float32 (float64 for float64 inputs), rounded once at the end.
"""

from ofa_kernels.reference.attention_curvature import (
    AttentionSums,
    Move,
    attention_adjoint,
    attention_curvature,
    score_blocks,
)
from ofa_kernels.reference.attention_heads import Attends, HeadNorm, Rotary, per_query_head
from ofa_kernels.reference.branch_diagonal import attention_diagonal, attention_trace, mlp_diagonal
from ofa_kernels.reference.mlp_curvature import ACTIVATIONS, mlp_curvature, mlp_slopes
from ofa_kernels.reference.stream import (
    KINDS,
    check_norm,
    check_same_shape,
    check_stack,
    contract,
    displace,
    norm_step,
    normalize,
    perturb,
    probed_diagonal,
    rstd,
    squared_norm,
)

__all__ = [
    "ACTIVATIONS",
    "KINDS",
    "Attends",
    "AttentionSums",
    "HeadNorm",
    "Move",
    "Rotary",
    "attention_adjoint",
    "attention_curvature",
    "attention_diagonal",
    "attention_trace",
    "check_norm",
    "check_same_shape",
    "check_stack",
    "contract",
    "displace",
    "mlp_curvature",
    "mlp_diagonal",
    "mlp_slopes",
    "norm_step",
    "normalize",
    "per_query_head",
    "perturb",
    "probed_diagonal",
    "rstd",
    "score_blocks",
    "squared_norm",
]
