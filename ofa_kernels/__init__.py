"""The tensor operations of the regularizers, without models or tasks.

`reference` is the specification in plain PyTorch; `dispatch` chooses an implementation for every call.
"""

from ofa_kernels import reference
from ofa_kernels.dispatch import (
    attention_curvature,
    attention_diagonal,
    attention_trace,
    contract,
    mlp_curvature,
    mlp_diagonal,
    norm_step,
    perturb,
)

__all__ = [
    "attention_curvature",
    "attention_diagonal",
    "attention_trace",
    "contract",
    "mlp_curvature",
    "mlp_diagonal",
    "norm_step",
    "perturb",
    "reference",
]
