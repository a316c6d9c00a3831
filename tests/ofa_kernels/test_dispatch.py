"""The implementation is chosen per call from the tensors; the reference takes what no other accepts."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ofa_kernels
from ofa_kernels import dispatch, reference
from ofa_kernels.dispatch import OPERATIONS, Implementation
from ofa_kernels.reference import Attends

STREAM, SCALE = torch.linspace(-1, 2, 24).view(2, 3, 4), torch.linspace(0.5, 1.5, 4)
HEADS, KEYS = torch.linspace(-1, 1, 48).view(1, 4, 3, 4), torch.linspace(2, -1, 24).view(1, 2, 3, 4)
GATE, SUMS = STREAM.view(6, 4), torch.linspace(-1, 1, 16).view(1, 4, 2, 2)
WEIGHTS = HEADS[0][:, :2], KEYS[0][:, :2], KEYS[0][:, 1:], HEADS[0].mT[:, :, :2]
PROBED = {"epsilon": 0.1, "seed": 3, "step": 1}
CALLS = {
    "norm_step": ((STREAM, 2 * STREAM, SCALE), {"eps": 1e-5, "kind": "layer"}),
    "normalize": ((STREAM, SCALE), {"eps": 1e-5, "kind": "layer"}),
    "squared_norm": ((STREAM,), {}),
    "perturb": ((STREAM, SCALE), {"eps": 1e-5, "samples": 2, **PROBED}),
    "displace": ((STREAM, SCALE), {"samples": 2, **PROBED}),
    "contract": ((STREAM, torch.stack((STREAM, -STREAM))), {"seed": 3, "step": 1}),
    "probed_diagonal": ((STREAM, torch.stack((STREAM, -STREAM)), STREAM[..., 0]), {"seed": 3, "step": 1}),
    "mlp_curvature": ((STREAM, 2 * STREAM, STREAM[..., 0]), {"activation": "silu"}),
    "mlp_diagonal": (([GATE, 2 * GATE], GATE.mT, [GATE.mT, -GATE.mT]), {"scale": SCALE}),
    "attention_curvature": ((HEADS, KEYS, -KEYS, HEADS, STREAM[:1, :, 0], Attends(0.5, causal=True)), {}),
    "attention_trace": ((*WEIGHTS, (SUMS, -SUMS, SUMS[..., 0, 0]), SCALE), {"scale": SCALE}),
    "attention_diagonal": ((*WEIGHTS, (SUMS[0], -SUMS[0], SUMS[0, :, 0, 0])), {"scale": SCALE}),
}


DIFFERENTIABLE = [name for name in OPERATIONS if not name.startswith(("mlp", "attention", "probed"))]


def tensors(given: object) -> list[torch.Tensor]:
    """All tensors in the results of a call, in any nesting."""
    if isinstance(given, torch.Tensor):
        return [given]
    return [x for one in given for x in tensors(one)] if isinstance(given, (tuple, list)) else []


over_operations = pytest.mark.parametrize("operation", OPERATIONS)


@pytest.fixture
def offer(monkeypatch):
    """Put an implementation that answers "other" in the place of an operation's kernel, for this test only."""
    monkeypatch.delenv("OFA_KERNELS", raising=False)

    def offer(operation, accepts):
        other = Implementation("other", lambda *args, **kwargs: "other", accepts)
        monkeypatch.setitem(dispatch._IMPLEMENTATIONS, operation, (other, dispatch._IMPLEMENTATIONS[operation][-1]))

    return offer


@over_operations
def test_on_the_cpu_an_operation_is_the_reference(operation):
    """Bit-identical."""
    args, kwargs = CALLS[operation]
    found, expected = (tensors(getattr(where, operation)(*args, **kwargs)) for where in (dispatch, reference))
    assert found
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 3), torch.ones(3, dtype=torch.float64), torch.ones(0, 4), torch.ones(2, 3, device="meta")],
    ids=["float32", "float64", "no rows", "meta"],
)
def test_the_reference_takes_tensors_that_no_kernel_accepts(offer, tensor):
    for operation in OPERATIONS:
        offer(operation, accepts=lambda tensor: False)
        assert dispatch.choose(operation, tensor).name == "reference"


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
def test_on_a_gpu_kernels_run_where_they_can(offer, monkeypatch, installed, dtype, width, kernels):
    """Decided from the tensor, without a GPU; curvature kernels only run without gradients."""
    monkeypatch.setattr(dispatch, "_HAS_TRITON", installed)
    with FakeTensorMode():
        tensor = torch.empty(2, 3, 5, width, device="cuda", dtype=dtype)
    for operation, enabled in product(OPERATIONS, (True, False)):
        with torch.set_grad_enabled(enabled):
            taken = operation in DIFFERENTIABLE or not enabled
            found = dispatch.choose(operation, tensor).name
        assert found == ("triton" if kernels and taken else "reference"), (operation, enabled)


@over_operations
def test_an_implementation_runs_only_for_tensors_it_accepts(offer, operation):
    args, kwargs = CALLS[operation]
    offer(operation, accepts=lambda tensor: tensor.dtype == torch.float32)
    assert getattr(dispatch, operation)(*args, **kwargs) == "other"
    assert dispatch.choose(operation, torch.ones(2, 3, dtype=torch.float64)).name == "reference"


@over_operations
def test_the_environment_leaves_only_the_reference(offer, monkeypatch, operation):
    args, kwargs = CALLS[operation]
    offer(operation, accepts=lambda tensor: True)
    monkeypatch.setenv("OFA_KERNELS", "reference")
    tensor = tensors(args)[0]
    assert dispatch.choose(operation, tensor).function is getattr(reference, operation)
    found, expected = (tensors(getattr(where, operation)(*args, **kwargs)) for where in (dispatch, reference))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    monkeypatch.setenv("OFA_KERNELS", "")
    assert dispatch.choose(operation, tensor).name == "other"


def test_importing_needs_neither_triton_nor_a_gpu():
    """Works without Triton; with Triton, nothing imports it before the first launch."""
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
