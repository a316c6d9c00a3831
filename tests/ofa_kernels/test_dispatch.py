"""Which implementation runs is decided per call and from the tensor; the reference takes whatever nobody else does."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import ofa_kernels
from ofa_kernels import dispatch, reference
from ofa_kernels.dispatch import OPERATIONS, Implementation

STREAM, SCALE = torch.linspace(-1, 2, 24).view(2, 3, 4), torch.linspace(0.5, 1.5, 4)
PROBED = {"epsilon": 0.1, "seed": 3, "step": 1}
CALLS = {
    "norm_step": ((STREAM, 2 * STREAM, SCALE), {"eps": 1e-5, "kind": "layer"}),
    "squared_norm": ((STREAM,), {}),
    "perturb": ((STREAM, SCALE), {"eps": 1e-5, "samples": 2, **PROBED}),
    "displace": ((STREAM, SCALE), {"samples": 2, **PROBED}),
    "contract": ((STREAM, torch.stack((STREAM, -STREAM))), {"seed": 3, "step": 1}),
    "step_boundary": (
        (STREAM, 2 * STREAM, torch.stack((STREAM, -STREAM)), SCALE),
        {"eps": 1e-5, "samples": 2, **PROBED},
    ),
    "rstd": ((STREAM,), {"eps": 1e-5}),
}
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
    args, kwargs = CALLS[operation]
    actual, expected = (getattr(where, operation)(*args, **kwargs) for where in (dispatch, reference))
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (actual, expected)), strict=True):
        assert torch.equal(a, b)


@over_operations
@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 3), torch.ones(3, dtype=torch.float64), torch.ones(0, 4), torch.ones(2, 3, device="meta")],
    ids=["float32", "float64", "no rows", "meta"],
)
def test_the_reference_takes_what_nobody_else_does(offer, operation, tensor):
    offer(operation, accepts=lambda tensor: False)
    assert dispatch.choose(operation, tensor).function is getattr(reference, operation)


@over_operations
def test_an_implementation_runs_only_for_tensors_it_accepts(offer, operation):
    args, kwargs = CALLS[operation]
    offer(operation, accepts=lambda tensor: tensor.dtype == torch.float32)
    assert getattr(dispatch, operation)(*args, **kwargs) == "other"
    double = [arg.double() for arg in args]
    assert getattr(dispatch, operation)(*double, **kwargs) != "other"


def test_the_last_one_registered_is_asked_first(offer):
    offer("rstd", accepts=lambda tensor: True, name="first")
    offer("rstd", accepts=lambda tensor: tensor.shape[-1] == 4, name="second")
    assert dispatch.rstd(torch.ones(2, 4), eps=1.0) == "second"
    assert dispatch.rstd(torch.ones(2, 5), eps=1.0) == "first"


def test_the_environment_leaves_only_the_reference(offer, monkeypatch):
    offer("rstd", accepts=lambda tensor: True)
    monkeypatch.setenv("OFA_KERNELS", "reference")
    assert dispatch.choose("rstd", STREAM).name == "reference"
    monkeypatch.setenv("OFA_KERNELS", "")
    assert dispatch.choose("rstd", STREAM).name == "other"


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
