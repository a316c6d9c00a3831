"""Launches and bytes of a layer are those of its operations, and what fusing was built for is there."""

from __future__ import annotations

import pytest
import torch

from benchmarks import launches, traffic
from benchmarks.launches import Launches, of_a_layer
from benchmarks.traffic import Size
from ofa_kernels.ops import norm_step
from ofa_kernels.ops.launching import launching_by

SIZE = Size(6, 64, itemsize=2)
"""Rows of a bfloat16 stream; scales are float32."""


def counted(call, *args):
    with Launches() as found, launching_by(found.launch, "sm_90"):
        call(*args)
    return found.kernels, found.nbytes


def test_a_kernel_moves_what_the_bytes_model_says():
    """`test_traffic` holds the model to the kernels in the interpreter."""
    rows, scale, row = torch.zeros(6, 64, dtype=torch.bfloat16), torch.zeros(64), torch.zeros(6)
    forward = torch.ops.ofa_kernels.norm_step
    assert counted(forward, rows, rows, scale, None, 1e-6, False, 0.0, True) == (
        1,
        traffic.norm_step_forward(SIZE).total,
    )
    sums = norm_step.ScaleGradients(_backward_kernel(), 6, rows, 64, biased=False, written=True).weight
    # The partial sums of γ's gradient are written, and added up by a kernel of PyTorch.
    partial = 2 * sums.numel() * sums.element_size()
    given = rows, rows, scale, row, row, rows, rows, row, None, False, 0.0, False
    expected = traffic.norm_step_backward(SIZE).total + partial
    assert counted(torch.ops.ofa_kernels.norm_step_backward, *given) == (2, expected)


def _backward_kernel():
    from ofa_kernels.kernels.norm_step import norm_step_backward

    return norm_step_backward


def test_a_fused_layer_launches_less_and_its_step_ratio_nothing_more(monkeypatch):
    """At most 0.8 of Transformers' launches and bytes. The ratio's gradient reads two updates and writes their own."""
    monkeypatch.setattr(launches, "TOKENS", 64)
    own, fused, measured = map(of_a_layer, (launches.OWN_NORMS, "fused layers", "fused layers, step ratio"))
    assert measured.launches == fused.launches <= 0.8 * own.launches
    assert fused.nbytes <= measured.nbytes <= 0.8 * own.nbytes
    stream = 64 * 64 * 2
    assert measured.nbytes - fused.nbytes == pytest.approx(4 * stream, rel=0.2)


def test_probes_launch_a_branch_again_and_three_kernels_for_any_number_of_them(monkeypatch):
    """Copies, their contraction and its last sum; the branch's own launches are fewer than a layer's."""
    monkeypatch.setattr(launches, "TOKENS", 64)
    fused, one, four = map(of_a_layer, ("fused layers", "fused layers, one probe", "fused layers, four probes"))
    assert four.launches == one.launches <= 2 * fused.launches
