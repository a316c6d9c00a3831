"""The operations in PyTorch: schemas, shapes of fake tensors, compilation, dispatch."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ofa_kernels import dispatch
from ofa_kernels.ops import launching, norm_step
from tests.ofa_kernels.calls import DEVICE, OPERATIONS, as_tuple, call, draw

Z, STACK, SCALE, ROW = draw(3, 20), draw(2, 3, 20, seed=1), draw(20, seed=2), draw(3, seed=3)
NORM, PROBE = (1e-5, True, 1.0), (7, 3, False)
ARGUMENTS = {
    "norm_step": (Z, Z, SCALE, SCALE, *NORM, True),
    "norm_step without update": (Z, None, SCALE, None, *NORM, True),
    "norm_step unmeasured": (Z, Z, SCALE, None, *NORM, False),
    "norm_step_backward": (Z, Z, SCALE, ROW, ROW, Z, Z, ROW, ROW, True, 1.0, True),
    "perturb": (Z, None, SCALE, SCALE, *NORM, True, 2, 0.1, *PROBE),
    "perturb behind": (Z, Z, SCALE, None, *NORM, True, 2, 0.1, *PROBE),
    "perturb_backward": (Z, SCALE, STACK, *NORM, 0.1, *PROBE, True),
    "displace": (Z, Z, 2, 0.1, *PROBE),
    "displace_backward": (STACK, 0.1, *PROBE, True),
    "contract": (Z, STACK, *PROBE),
    "contract_backward": (Z, STACK[..., 0], ROW, 2, *PROBE),
    "contract_backward of a length": (Z, None, ROW, 0, *PROBE),
    "probed_diagonal": (Z[None], STACK.unsqueeze(1), ROW[None], *PROBE),
}


def arguments(name, requires_grad):
    """Float32 copies on the kernels' device."""
    return [
        x.float().contiguous().requires_grad_(requires_grad) if isinstance(x, torch.Tensor) else x
        for x in ARGUMENTS[name]
    ]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name):
    """Schema, autograd registration, shapes of fake tensors, and tracing, by PyTorch's own check."""
    forward = not name.split()[0].endswith(("_backward", "_diagonal"))
    operation = getattr(torch.ops.ofa_kernels, name.split()[0]).default
    torch.library.opcheck(operation, arguments(name, requires_grad=forward))


# A size that is a symbol is all that a constant is, and more.
@pytest.mark.parametrize(
    ("operation", "dynamic"), [*((operation, True) for operation in OPERATIONS), ("norm_step", False)]
)
def test_compiles_into_one_graph(operation, dynamic):
    """Forward and backward without a graph break, bit-identical to eager."""
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


class Seen(TorchDispatchMode):
    """A dispatch mode that records the names of operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def gradients(update, weight, stream):
    """Gradients of all outputs of a norm step in all its inputs."""
    given = [x.detach().requires_grad_() for x in (stream, update, weight)]
    outputs = norm_step.norm_step(*given, eps=1e-5)
    total = sum((output * (1 + index)).sin().sum() for index, output in enumerate(outputs))
    return [*outputs, *torch.autograd.grad(total, given)]


def test_a_plain_call_is_launched_at_once_and_a_watched_one_is_the_registered_operation():
    """Bit-identical either way; a mode sees one operation in each direction."""
    tensors = Z.float(), SCALE.float(), Z.float() + 1
    at_once = gradients(*tensors)
    with Seen() as mode:
        watched = gradients(*tensors)
    assert {"norm_step", "norm_step_backward"} <= mode.names
    assert all(torch.equal(one, other) for one, other in zip(at_once, watched, strict=True))
    assert at_once[1].grad_fn.name() != watched[1].grad_fn.name()


def test_tensor_subclasses_and_functional_transforms_use_the_registered_operation():
    assert launching.is_direct((Z, torch.nn.Parameter(Z), None, 1, 0.5, "silu"))
    assert not launching.is_direct((Z.as_subclass(type("Own", (torch.Tensor,), {})),))
    inside = []
    torch.func.vmap(lambda row: inside.append(launching.is_direct((row,))) or row)(Z)
    with FakeTensorMode() as mode:
        inside.append(launching.is_direct((Z,)))
    inside.append(launching.is_direct((mode.from_tensor(Z),)))
    assert inside == [False] * 3


def test_without_a_gradient_nothing_is_kept():
    """If no input requires a gradient, or in no_grad."""
    tracked = Z.float().requires_grad_()
    for update, enabled in ((Z.float(), True), (tracked, False)):
        with torch.set_grad_enabled(enabled):
            outputs = norm_step.norm_step(Z.float(), update, SCALE.float(), eps=1e-5)
        assert not any(output.requires_grad for output in outputs)
