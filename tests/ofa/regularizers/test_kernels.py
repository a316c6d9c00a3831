"""The regularizers on the Triton kernels: the reference's numbers, and the number of launches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

import ofa
from benchmarks.eager_traffic import Ledger
from benchmarks.workloads import TINY, batch, build
from ofa_kernels import dispatch
from ofa_kernels.ops import launching
from tests import families
from tests.device import DEVICE

CASES = [(name, "rademacher", 1) for name in ("gemma", "phi", "olmo2", "bert", "opt", "granite")]
CASES += [("llama", "gaussian", 2)]
"""1+w, parallel branches, norms after the branch and after the sum, LayerNorm of flattened rows, scaled steps,
several probes."""

EPSILON = 0.05
"""Large, so that float32 differences are not divided by a small number."""


@pytest.fixture
def on_kernels(monkeypatch):
    """Use the kernels on any device; on a CPU Triton's interpreter runs them."""
    monkeypatch.delenv("OFA_KERNELS", raising=False)
    for operation, offered in dispatch._IMPLEMENTATIONS.items():
        eager = [replace(one, accepts=_float32) if one.name == "triton" else one for one in offered]
        monkeypatch.setitem(dispatch._IMPLEMENTATIONS, operation, eager)


@pytest.fixture
def launches():
    """Count launches of each kernel without running them; outputs are arbitrary."""
    counted = Counter()

    def count(kernel, grid, args, keywords):
        counted[kernel.fn.__name__] += 1

    with launching.launching_by(count, launching.architecture(torch.device(DEVICE))):
        yield counted


def _float32(tensor):
    return tensor.dtype == torch.float32 and tensor.dim() > 0


def shallow(model):
    """The model with its first layer only: both branches, and a gradient from one into the other."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == families.SIZE["num_hidden_layers"]:
                setattr(parent, name, child[:1])
    return model


def measure(name, granularity="sublayer", dtype=torch.float32, change=lambda model: model, **options):
    """Traces, squared lengths of the steps, and the penalty's gradient in the norm scales."""
    model = change(families.build(name)).to(dtype)
    parameters = ofa.tune_norms(model)
    given = families.inputs(name, sequences=1, tokens=3)
    plain = {"estimator": "hutchinson", "gradient": "full", "sharpness": 1.0, "step_ratio": 1.0}
    options = {**plain, "epsilon": EPSILON if options.get("estimator") != "exact" else None, **options}
    with ofa.fused_regularizers(model, granularity=granularity, **options) as reg:
        model(**given)
        gradient = torch.autograd.grad(reg.penalty(), parameters, allow_unused=True, materialize_grads=True)
        measured = reg.measurements
    return measured.traces.detach(), measured.step_norms.detach(), torch.cat([grad.flatten() for grad in gradient])


@pytest.mark.parametrize(("name", "probe", "samples"), CASES)
def test_the_numbers_are_those_of_the_reference(name, probe, samples, request, monkeypatch):
    monkeypatch.setenv("OFA_KERNELS", "reference")
    options = {"samples": samples, "probe": probe, "change": shallow}
    expected = measure(name, **options)
    request.getfixturevalue("on_kernels")
    # A float32 copy has an error of a few units of 1.2e-7, its branch too; a product adds 32 of them with signs, and
    # is divided by ε = 0.05: 1e-7 · 8 · √32 / 0.05 ≈ 1e-4 of the branch's size. The gradient is one order smoother.
    for actual, wanted in zip(measure(name, **options), expected, strict=True):
        gap = torch.linalg.vector_norm(actual - wanted) / torch.linalg.vector_norm(wanted)
        assert float(gap) <= 1e-4


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        *((name, "exact") for name in ("llama", "gpt2", "qwen3", "olmo2")),
        ("qwen3", "hutchinson"),
        ("gpt2", "hutchinson"),
    ],
)
def test_held_curvature_has_the_numbers_of_the_reference(name, estimator, request, monkeypatch):
    """RMSNorm, LayerNorm with biases, norms on heads, and norms after branches, for which half of the kernels run."""
    options = {"estimator": estimator, "gradient": "preconditioner", "change": shallow}
    monkeypatch.setenv("OFA_KERNELS", "reference")
    expected = measure(name, **options)
    request.getfixturevalue("on_kernels")
    for actual, wanted in zip(measure(name, **options), expected, strict=True):
        gap = torch.linalg.vector_norm(actual - wanted) / torch.linalg.vector_norm(wanted)
        assert float(gap) <= 1e-4


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("samples", [1, 4])
def test_a_measured_branch_takes_two_launches_in_each_direction(launches, samples):
    """For any number of probes, with the gradient through everything."""
    traces, _, _ = measure("llama", samples=samples)
    kernels = ("perturb", "contract")
    assert launches == {f"{kernel}_{way}": len(traces) for kernel in kernels for way in ("forward", "backward")}


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("samples", [1, 4])
def test_probes_with_held_curvature_take_two_launches_and_none_in_the_backward_pass(launches, samples):
    """For any number of probes: one makes the copies, and one contracts what came of them, drawing the probes again."""
    traces, _, _ = measure("llama", gradient="preconditioner", samples=samples)
    held = {kernel: times for kernel, times in launches.items() if not kernel.startswith("contract")}  # of the lengths
    assert held == {"perturb_forward": len(traces), "probed_diagonal_rows": len(traces)}


@pytest.mark.usefixtures("on_kernels")
def test_held_curvature_takes_eight_launches_in_a_layer_and_none_in_the_backward_pass(launches):
    """Each kernel once: three for the attention's sums, one for the MLP's, four for the weights."""
    traces, _, _ = measure("llama", estimator="exact", gradient="preconditioner")
    layers = len(traces) // 2
    held = {kernel: times for kernel, times in launches.items() if not kernel.startswith("contract")}  # of the lengths
    assert set(held.values()) == {layers}
    assert len(held) <= 8
    assert not [kernel for kernel in held if "backward" in kernel]


@pytest.mark.usefixtures("on_kernels", "launches")
def test_launches_besides_the_kernels_do_not_grow_with_the_steps():
    """Masks, means and factors of lengths are applied to all steps at once, so a branch adds one kernel."""
    shape = dict(TINY.shape)
    extra = {}
    for layers in (1, 3):
        workload = replace(TINY, shape=tuple({**shape, "num_hidden_layers": layers}.items()))
        model, ids = build(workload).to(DEVICE), batch(workload).to(DEVICE)
        with Ledger() as plain:
            model(input_ids=ids, use_cache=False)
        with ofa.fused_regularizers(model, sharpness=0.0) as reg, Ledger() as measured:
            model(input_ids=ids, use_cache=False)
            reg.penalty()
        extra[layers] = measured.kernels - plain.kernels - 2 * layers
    assert extra[1] == extra[3]
