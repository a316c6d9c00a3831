"""Tensor operations behind the regularizers: tensors in, tensors out, no model and no task.

`reference` is the specification in plain PyTorch; `dispatch` decides per call which implementation runs.
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
    step_boundary,
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
    "step_boundary",
]
