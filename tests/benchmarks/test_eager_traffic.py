"""Eager traffic is counted, not estimated: inputs and outputs of each kernel, and of nothing else."""

from __future__ import annotations

import torch

from benchmarks import eager_traffic
from benchmarks.eager_traffic import Counted
from benchmarks.implementations import Case, Operation, Pass, passes
from benchmarks.traffic import Traffic

CASE = Case(8, 64, torch.float32, torch.device("cpu"))


def counted(function, samples=0):
    """The count of a function of one tensor of 8 × 64 float32 numbers, 2048 bytes."""
    operation = Operation(
        "made up",
        inputs=lambda case: (torch.randn(case.rows, case.width),),
        gradients=lambda case: (),
        forward=lambda size: Traffic(0, 0),
        backward=lambda size: Traffic(0, 0),
        eager=function,
        triton=None,
    )
    return eager_traffic.count(Pass(operation, "forward"), CASE)


def test_a_kernel_reads_its_inputs_and_writes_its_outputs():
    assert counted(lambda x: (x * x,)) == Counted(3 * 2048, 1)
    assert counted(lambda x: (x.exp().sum(1),)) == Counted(2 * 2048 + 2048 + 8 * 4, 2)


def test_views_and_questions_are_no_kernels():
    assert counted(lambda x: (x.view(-1)[3:].unsqueeze(0).expand(4, -1),)) == Counted(0, 0)
    assert counted(lambda x: (x.to(x.device),)) == Counted(0, 0)


def test_an_expanded_tensor_is_read_as_what_it_holds():
    assert counted(lambda x: (x + x[:1].expand(8, -1),)) == Counted(2048 + 2048 // 8 + 2048, 1)


def test_every_operation_moves_more_in_pieces_than_in_one_sweep():
    for one in passes((1,)):
        assert eager_traffic.count(one, CASE).nbytes > one.traffic(CASE).total
