"""The specification of every operation, in plain differentiable PyTorch.

It is the oracle of the kernels' tests and the baseline of the benchmarks, and on the CPU it is what runs, except for
the traces: theirs would keep many times what a training step may keep, so that `ofa_kernels.fused` has them for every
device. Tensors may have any leading shape; a row is everything but the last dimension. Arithmetic is float32
(float64 for float64 inputs) from the load to one cast at the store.
"""

from ofa_kernels.reference.attention_moments import attention_moments
from ofa_kernels.reference.attention_moments import bias as attention_bias
from ofa_kernels.reference.attention_trace import HeadNorm, Rotary, attention_tangent, attention_trace
from ofa_kernels.reference.constants import (
    attention_constants,
    attention_constants_gradient,
    mlp_constants,
    mlp_constants_gradient,
)
from ofa_kernels.reference.mlp_trace import ACTIVATIONS, mlp_trace
from ofa_kernels.reference.norm_trace import norm_trace
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
    rstd,
    squared_norm,
    step_boundary,
)

__all__ = [
    "ACTIVATIONS",
    "KINDS",
    "HeadNorm",
    "Rotary",
    "attention_bias",
    "attention_constants",
    "attention_constants_gradient",
    "attention_moments",
    "attention_tangent",
    "attention_trace",
    "check_norm",
    "check_same_shape",
    "check_stack",
    "contract",
    "displace",
    "mlp_constants",
    "mlp_constants_gradient",
    "mlp_trace",
    "norm_step",
    "norm_trace",
    "normalize",
    "perturb",
    "rstd",
    "squared_norm",
    "step_boundary",
]
