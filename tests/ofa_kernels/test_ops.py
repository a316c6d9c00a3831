"""The operations as PyTorch's own machinery sees them: schemas, shapes without data, compilation, dispatch."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ofa_kernels import dispatch
from ofa_kernels.launch import MAX_WIDTH
from ofa_kernels.ops import norm_step
from tests.ofa_kernels.calls import DEVICE, OPERATIONS, as_tuple, call, draw

Z, STACK, SCALE, ROW = draw(3, 20), draw(2, 3, 20, seed=1), draw(20, seed=2), draw(3, seed=3)
NORM, PROBE = (1e-5, True, 1.0), (7, 3, False)
ARGUMENTS = {
    "norm_step": (Z, Z, SCALE, SCALE, *NORM),
    "norm_step without update": (Z, None, SCALE, None, *NORM),
    "norm_step_backward": (Z, Z, SCALE, ROW, ROW, Z, Z, ROW, ROW, True, 1.0, True),
    "perturb": (Z, None, SCALE, SCALE, *NORM, 2, 0.1, *PROBE),
    "perturb behind": (Z, Z, SCALE, None, *NORM, 2, 0.1, *PROBE),
    "perturb_backward": (Z, SCALE, STACK, *NORM, 0.1, *PROBE, True),
    "displace": (Z, Z, 2, 0.1, *PROBE),
    "displace_backward": (STACK, 0.1, *PROBE, True),
    "contract": (Z, STACK, *PROBE),
    "contract_backward": (Z, STACK[..., 0], ROW, 2, *PROBE),
    "step_boundary": (Z, Z, STACK, SCALE, SCALE, *NORM, 2, 0.1, *PROBE),
    "step_boundary_backward": (Z, Z, SCALE, Z, torch.stack((Z, Z, Z)), ROW, STACK[..., 0], 2, *NORM, 0.1, *PROBE, True),
    "mlp_trace": (Z, Z, SCALE, SCALE, SCALE, SCALE, Z, "silu"),
    "mlp_trace plain": (Z, None, SCALE, None, None, None, None, "gelu"),
    "mlp_trace_backward": (Z, Z, SCALE, SCALE, SCALE, SCALE, STACK, ROW, "silu"),
    "mlp_trace_backward plain": (Z, None, SCALE, None, None, None, STACK, None, "gelu"),
    "norm_trace": (Z, SCALE, Z, ROW, SCALE, *NORM),
    "norm_trace without shift": (Z, SCALE, Z, ROW, None, 1e-5, False, 0.0),
    "norm_trace_backward": (Z, SCALE, Z, ROW, SCALE, draw(4, 3, seed=4), ROW, True, 1.0),
    "norm_trace_backward without shift": (Z, SCALE, Z, ROW, None, draw(2, 3, seed=4), ROW, False, 0.0),
}


def arguments(name, requires_grad):
    """float32 copies on the device of the kernels."""
    return [
        x.float().contiguous().requires_grad_(requires_grad) if isinstance(x, torch.Tensor) else x
        for x in ARGUMENTS[name]
    ]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name):
    """Schema, autograd registration, shapes without data, and tracing, by PyTorch's own check."""
    forward = not name.split()[0].endswith("_backward")
    operation = getattr(torch.ops.ofa_kernels, name.split()[0]).default
    torch.library.opcheck(operation, arguments(name, requires_grad=forward))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(operation, dynamic):
    """Forward and backward, with no break, and the same bits."""
    case = call(operation, (2, 3, 20), torch.float32, "layer")
    compiled = torch.compile(case.kernel, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    plain, traced = case.run(case.kernel).tensors(), case.run(compiled).tensors()
    assert all(torch.equal(plain[name], traced[name]) for name in plain)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: on a CPU the kernels run in an interpreter only")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_with_inductor(operation):
    case = call(operation, (2, 3, 20), torch.float32, "layer")
    plain = case.run(case.kernel).tensors()
    traced = case.run(torch.compile(case.kernel, fullgraph=True)).tensors()
    assert all(torch.equal(plain[name], traced[name]) for name in plain)


def test_the_dispatched_operation_compiles_into_one_graph():
    def step(stream, update, scale):
        return dispatch.norm_step(stream, update, scale, eps=1e-5)

    inputs = [draw(2, 20).float(), draw(2, 20, seed=1).float(), draw(20, seed=2).float()]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(step(*inputs), compiled(*inputs), strict=True))


@pytest.mark.parametrize(
    ("device", "dtype", "width", "expected"),
    [
        ("cuda", torch.bfloat16, 64, "triton"),
        ("cuda", torch.float16, 64, "triton"),
        ("cuda", torch.float32, MAX_WIDTH, "triton"),
        ("cuda", torch.float64, 64, "reference"),
        ("cuda", torch.float32, MAX_WIDTH + 1, "reference"),
        ("cpu", torch.float32, 64, "reference"),
        ("meta", torch.float32, 64, "reference"),
    ],
)
def test_kernels_run_for_what_they_take_on_a_gpu(device, dtype, width, expected, monkeypatch):
    """Tensors without data stand for those of a GPU, so that this shows on a machine that has none."""
    monkeypatch.delenv("OFA_KERNELS", raising=False)
    with FakeTensorMode():
        tensor = torch.empty(2, width, dtype=dtype, device=device)
    for operation in dispatch.OPERATIONS:
        without = "fused" if operation in dispatch._FUSED else "reference"
        if operation == "attention_trace" and device == "cpu":
            without = "blocked"
        wanted = "triton" if expected == "triton" and operation in dispatch._KERNELS else without
        assert dispatch.choose(operation, tensor).name == wanted, operation


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_gpu_tensor_without_data_has_the_shapes_of_the_reference(operation, monkeypatch):
    monkeypatch.delenv("OFA_KERNELS", raising=False)
    case = call(operation, (2, 3, 20), torch.bfloat16, "layer")
    expected = as_tuple(case.reference(*case.inputs, **case.settings))

    def without_data(value):
        is_tensor = isinstance(value, torch.Tensor)
        return torch.empty(value.shape, dtype=value.dtype, device="cuda") if is_tensor else value

    with FakeTensorMode():
        settings = {name: without_data(value) for name, value in case.settings.items()}
        found = as_tuple(case.kernel(*map(without_data, case.inputs), **settings))
    for actual, wanted in zip(found, expected, strict=True):
        assert (actual.device.type, actual.shape, actual.dtype) == ("cuda", wanted.shape, wanted.dtype)


def test_a_wrong_kind_and_a_wrong_probe_are_refused():
    case = call("perturb", (2, 20), torch.float32)
    for setting, value in (("kind", "batch"), ("probe", "uniform")):
        with pytest.raises(ValueError, match=f"not '{value}'"):
            case.kernel(*case.inputs, **{**case.settings, setting: value})


def test_without_triton_the_operations_are_defined_and_a_launch_says_what_is_missing(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ofa_kernels.kernels.norm_step", None)
    with pytest.raises(ImportError):
        norm_step.norm_step(Z.float(), None, SCALE.float(), eps=1e-5)
