"""Which implementation runs is decided per call and from the tensor; the reference takes whatever nobody else does."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ofa_kernels
from ofa_kernels import dispatch, reference
from ofa_kernels.compiling import allow_in_graphs
from ofa_kernels.dispatch import OPERATIONS, Implementation

STREAM, SCALE = torch.linspace(-1, 2, 24).view(2, 3, 4), torch.linspace(0.5, 1.5, 4)
HEADS, KEYS = torch.linspace(-1, 1, 48).view(1, 4, 3, 4), torch.linspace(2, -1, 24).view(1, 2, 3, 4)
TRACE = torch.linspace(-1, 1, 64).view(4, 4, 4)
PROBED = {"epsilon": 0.1, "seed": 3, "step": 1}
CALLS = {
    "norm_step": ((STREAM, 2 * STREAM, SCALE), {"eps": 1e-5, "kind": "layer"}),
    "normalize": ((STREAM, SCALE), {"eps": 1e-5, "kind": "layer"}),
    "squared_norm": ((STREAM,), {}),
    "perturb": ((STREAM, SCALE), {"eps": 1e-5, "samples": 2, **PROBED}),
    "displace": ((STREAM, SCALE), {"samples": 2, **PROBED}),
    "contract": ((STREAM, torch.stack((STREAM, -STREAM))), {"seed": 3, "step": 1}),
    "step_boundary": (
        (STREAM, 2 * STREAM, torch.stack((STREAM, -STREAM)), SCALE),
        {"eps": 1e-5, "samples": 2, **PROBED},
    ),
    "rstd": ((STREAM,), {"eps": 1e-5}),
    "mlp_trace": ((STREAM, 2 * STREAM, SCALE, -SCALE), {"activation": "silu"}),
    "attention_trace": ((HEADS, KEYS, -KEYS, HEADS, TRACE, -TRACE, SCALE), {"scale": 0.5, "causal": True}),
    "attention_moments": (
        (HEADS, KEYS, -KEYS, HEADS, torch.ones(1, 3, 1), HEADS[..., :1], HEADS),
        {"scale": 0.5, "causal": True},
    ),
    "norm_trace": ((STREAM, SCALE, 2 * STREAM, STREAM[..., 0]), {"eps": 1e-5, "kind": "layer"}),
}
GATE, DOWN, OUTPUT = STREAM.view(6, 4), STREAM.view(6, 4).mT, TRACE[:, :, :2]
CALLS |= {
    "mlp_constants": ((GATE, 2 * GATE, DOWN, SCALE), {"centred": True}),
    "mlp_constants_gradient": ((GATE, 2 * GATE, DOWN, SCALE, (GATE[:, 0], GATE[:, 1])), {"centred": True}),
    "attention_constants": ((OUTPUT.mT, OUTPUT.mT[:2], -OUTPUT.mT[:2], OUTPUT, SCALE), {"centred": True}),
    "attention_constants_gradient": (
        (OUTPUT.mT, OUTPUT.mT[:2], -OUTPUT.mT[:2], OUTPUT, SCALE, (TRACE[:, :2, :2], TRACE[:, 2:, :2], SCALE)),
        {"centred": True},
    ),
}
BY_HAND = ("squared_norm", "mlp_trace", "attention_trace", "attention_moments", "norm_trace")
"""Operations with derivatives written by hand, for every device."""


def without_kernels(operation: str, device: str = "cpu") -> str:
    """What runs where no kernel does."""
    if operation == "attention_trace" and device == "cpu":
        return "blocked"
    return "fused" if operation in BY_HAND else "reference"


over_operations = pytest.mark.parametrize("operation", OPERATIONS)


@pytest.fixture
def offer(monkeypatch):
    """Register an implementation that answers "other", for this test only."""
    monkeypatch.delenv("OFA_KERNELS", raising=False)
    for operation, offered in dispatch._IMPLEMENTATIONS.items():
        monkeypatch.setitem(dispatch._IMPLEMENTATIONS, operation, list(offered))

    def offer(operation, accepts, name="other"):
        dispatch.register(operation, Implementation(name, lambda *args, **kwargs: name, accepts))

    return offer


@over_operations
def test_on_the_cpu_an_operation_is_the_reference(operation):
    """To the bit; those with derivatives written by hand to some roundings of float32, at the default 1e-5."""
    args, kwargs = CALLS[operation]
    actual, expected = (getattr(where, operation)(*args, **kwargs) for where in (dispatch, reference))
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (actual, expected)), strict=True):
        assert torch.allclose(a, b) if operation in BY_HAND else torch.equal(a, b)


@over_operations
@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 3), torch.ones(3, dtype=torch.float64), torch.ones(0, 4), torch.ones(2, 3, device="meta")],
    ids=["float32", "float64", "no rows", "meta"],
)
def test_plain_pytorch_takes_what_nobody_else_does(offer, operation, tensor):
    offer(operation, accepts=lambda tensor: False)
    assert dispatch.choose(operation, tensor).name == without_kernels(operation, tensor.device.type)


@over_operations
@pytest.mark.parametrize(
    ("installed", "dtype", "width", "kernels"),
    [
        (True, torch.float32, 4, True),
        (True, torch.bfloat16, 256, True),
        (True, torch.float64, 4, False),
        (True, torch.float32, 65537, False),
        (False, torch.float32, 4, False),
    ],
    ids=["float32", "bfloat16", "float64", "too wide", "no triton"],
)
def test_on_a_gpu_kernels_run_where_they_can(offer, monkeypatch, operation, installed, dtype, width, kernels):
    """Decided from a tensor of the device, without the device."""
    monkeypatch.setattr(dispatch, "_HAS_TRITON", installed)
    with FakeTensorMode():
        tensor = torch.empty(2, 3, 5, width, device="cuda", dtype=dtype)
    kernels = kernels and operation != "rstd"  # which has none
    assert dispatch.choose(operation, tensor).name == ("triton" if kernels else without_kernels(operation, "cuda"))


@pytest.mark.parametrize(("dtype", "widest"), [(torch.float32, 128), (torch.bfloat16, 256)], ids=str)
@pytest.mark.parametrize("operation", ["attention_trace", "attention_moments"])
def test_heads_too_wide_for_the_kernels_and_tensors_that_are_no_heads(monkeypatch, offer, operation, dtype, widest):
    """Their tiles fit neither into registers nor into shared memory; the rest of the GPU still computes them."""
    monkeypatch.setattr(dispatch, "_HAS_TRITON", True)
    with FakeTensorMode():
        tensors = [
            torch.empty(*shape, device="cuda", dtype=dtype)
            for shape in ((1, 2, 3, widest), (1, 2, 3, widest + 1), (2, 4))
        ]
    assert [dispatch.choose(operation, tensor).name for tensor in tensors] == ["triton", "fused", "fused"]


@over_operations
def test_an_implementation_runs_only_for_tensors_it_accepts(offer, operation):
    args, kwargs = CALLS[operation]
    offer(operation, accepts=lambda tensor: tensor.dtype == torch.float32)
    assert getattr(dispatch, operation)(*args, **kwargs) == "other"
    double = [tuple(x.double() for x in arg) if isinstance(arg, tuple) else arg.double() for arg in args]
    assert dispatch.choose(operation, double[0]).name == without_kernels(operation)
    assert getattr(dispatch, operation)(*double, **kwargs) != "other"


def test_the_last_one_registered_is_asked_first(offer):
    offer("rstd", accepts=lambda tensor: True, name="first")
    offer("rstd", accepts=lambda tensor: tensor.shape[-1] == 4, name="second")
    assert dispatch.rstd(torch.ones(2, 4), eps=1.0) == "second"
    assert dispatch.rstd(torch.ones(2, 5), eps=1.0) == "first"


@over_operations
def test_the_environment_leaves_only_the_reference(offer, monkeypatch, operation):
    args, kwargs = CALLS[operation]
    offer(operation, accepts=lambda tensor: True)
    monkeypatch.setenv("OFA_KERNELS", "reference")
    assert dispatch.choose(operation, args[0]).function is getattr(reference, operation)
    found, expected = (getattr(where, operation)(*args, **kwargs) for where in (dispatch, reference))
    pairs = zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, expected)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    monkeypatch.setenv("OFA_KERNELS", "")
    assert dispatch.choose(operation, args[0]).name == "other"


def test_generated_code_has_the_gradients_of_eager_code():
    """In what Inductor makes of the attention trace on a CPU too: it once gave away a buffer that was still read."""
    allow_in_graphs()
    generator = torch.Generator().manual_seed(0)
    given, options = CALLS["attention_trace"]
    given = [torch.randn(x.shape, generator=generator) for x in given]

    def gradients(call):
        inputs = [x.clone().requires_grad_() for x in given]
        tangent, trace = call(*inputs, **options)
        (tangent * tangent.detach().sin()).sum().add(trace.square().sum()).backward()
        return [x.grad for x in inputs]

    compiled = torch.compile(dispatch.attention_trace, fullgraph=True)
    for found, expected in zip(gradients(compiled), gradients(reference.attention_trace), strict=True):
        # Two orders of the sums of a few dozen terms: their rounding, and ten times that for what cancels.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_an_unknown_operation_is_refused(offer):
    with pytest.raises(KeyError, match="softmax"):
        offer("softmax", accepts=lambda tensor: True)
    with pytest.raises(KeyError, match="softmax"):
        dispatch.choose("softmax", STREAM)


def test_importing_needs_neither_triton_nor_a_gpu():
    """A machine without Triton imports and computes; one with it does not pay for it before it is asked for."""
    script = """
import sys, torch
before = "triton" in sys.modules
import ofa_kernels
assert ("triton" in sys.modules) == before, "ofa_kernels imported triton"
assert not torch.cuda.is_initialized(), "ofa_kernels touched the driver"
sys.modules["triton"] = None
assert ofa_kernels.norm_step(torch.ones(1, 4), None, torch.ones(4), eps=0.0)[3].item() == 1.0
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_public_names_exist():
    assert all(hasattr(ofa_kernels, name) for name in ofa_kernels.__all__)
