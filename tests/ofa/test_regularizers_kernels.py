"""The regularizers on the Triton kernels: the numbers of the reference, in two launches per branch and direction."""

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

CASES = [(name, "rademacher") for name in ("llama", "gpt2", "gemma", "phi", "olmo2", "bert", "opt", "granite")]
CASES += [("llama", "gaussian")]
"""RMSNorm, LayerNorm with a shift, 1+w, parallel branches, norms behind the branch, flattened rows, scaled steps."""

EPSILON = 0.05
"""Large, so that what is compared is the kernels' arithmetic and not float32 differences divided by a small number."""


@pytest.fixture
def on_kernels(monkeypatch):
    """The kernels for whatever device the tests run on; Triton's interpreter runs them on a CPU."""
    monkeypatch.delenv("OFA_KERNELS", raising=False)
    for operation, offered in dispatch._IMPLEMENTATIONS.items():
        eager = [replace(one, accepts=_float32) if one.name == "triton" else one for one in offered]
        monkeypatch.setitem(dispatch._IMPLEMENTATIONS, operation, eager)


@pytest.fixture
def launches():
    """How often each kernel is launched; none of them runs, and what they would write holds anything."""
    counted = Counter()

    def count(kernel, grid, args, keywords):
        counted[kernel.fn.__name__] += 1

    with launching.launching_by(count, launching.architecture(torch.device(DEVICE))):
        yield counted


def _float32(tensor):
    return tensor.dtype == torch.float32 and tensor.dim() > 0


def measure(name, granularity="sublayer", dtype=torch.float32, **options):
    """Traces, squared lengths of the steps, and the penalty's gradient in the norm scales."""
    model = families.build(name).to(dtype)
    parameters = ofa.tune_norms(model)
    given = families.inputs(name, sequences=1, tokens=3)
    options = {"estimator": "hutchinson", "epsilon": EPSILON, "sharpness": 1.0, "step_ratio": 1.0, **options}
    with ofa.fused_regularizers(model, granularity=granularity, **options) as reg:
        model(**given)
        gradient = torch.autograd.grad(reg.penalty(), parameters, allow_unused=True, materialize_grads=True)
        measured = reg.measurements
    return measured.traces.detach(), measured.step_norms.detach(), torch.cat([grad.flatten() for grad in gradient])


@pytest.mark.parametrize(("name", "probe"), CASES)
def test_the_numbers_are_those_of_the_reference(name, probe, request, monkeypatch):
    monkeypatch.setenv("OFA_KERNELS", "reference")
    expected = measure(name, samples=2, probe=probe)
    request.getfixturevalue("on_kernels")
    # A float32 copy is off by a few units of 1.2e-7, its branch by as many; a product adds 32 of them with signs, and
    # is divided by ε = 0.05: 1e-7 · 8 · √32 / 0.05 ≈ 1e-4 of the branch's size. The gradient is one order smoother.
    for actual, wanted in zip(measure(name, samples=2, probe=probe), expected, strict=True):
        gap = torch.linalg.vector_norm(actual - wanted) / torch.linalg.vector_norm(wanted)
        assert float(gap) <= 1e-4


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize(("samples", "steps"), [(1, 1.0), (4, 1.0), (1, 0.5)])
def test_a_measured_branch_takes_two_launches_in_each_direction(launches, samples, steps):
    """However many probes there are; branches whose trace is not measured take one, for their length."""
    traces, _, _ = measure("llama", samples=samples, steps=steps)
    branches = len(traces)
    traced = round(branches * steps)
    for direction in ("forward", "backward"):
        assert launches[f"perturb_{direction}"] == traced
        assert launches[f"contract_{direction}"] == branches
    assert sum(launches.values()) == 2 * (traced + branches)


BIASED = ("qwen2", "gpt2")
"""Biases of the projections behind an RMSNorm with rotated heads, and behind a LayerNorm with a shift of its own."""
TOKENS = {f"attention_trace_{name}" for name in ("features", "combine")}
TOKENS |= {f"attention_trace_backward_{name}" for name in ("own", "tokens", "constants")}
SWEEPS = {f"attention_moments_{name}" for name in ("forward", "backward_rows", "backward_keys", "backward_values")}


@pytest.mark.parametrize("name", BIASED)
def test_attention_with_biases_is_kernels_alone_and_as_close_as_the_reference(name, monkeypatch):
    """Each of the nine once for an attention in 16 bits, so that nothing goes through PyTorch around the sweeps.

    At most twice the error of PyTorch in the same dtype, or a unit of it, where that is next to nothing.
    """
    options = {"estimator": "exact", "epsilon": None}
    monkeypatch.setenv("OFA_KERNELS", "reference")
    wide, eager = (measure(name, dtype=dtype, **options) for dtype in (torch.float32, torch.float16))
    monkeypatch.delenv("OFA_KERNELS")
    offered, counted = dispatch._IMPLEMENTATIONS["attention_trace"], Counter()
    kernels = [replace(one, accepts=lambda query: True) if one.name == "triton" else one for one in offered]
    monkeypatch.setitem(dispatch._IMPLEMENTATIONS, "attention_trace", kernels)

    def count(kernel, *args):
        counted[kernel.fn.__name__] += 1
        launching._launch(kernel, *args)

    with launching.launching_by(count, launching.architecture(torch.device(DEVICE))):
        found = measure(name, dtype=torch.float16, **options)
    attention = {kernel: times for kernel, times in counted.items() if kernel in TOKENS | SWEEPS}
    assert attention == dict.fromkeys(TOKENS | SWEEPS, len(found[0]) // 2)
    for actual, plain, wanted in zip(found, eager, wide, strict=True):
        gaps = [float(torch.linalg.vector_norm(x - wanted) / torch.linalg.vector_norm(wanted)) for x in (actual, plain)]
        assert gaps[0] <= max(2 * gaps[1], torch.finfo(torch.float16).eps)


@pytest.mark.usefixtures("on_kernels", "launches")
def test_what_is_launched_around_the_kernels_does_not_grow_with_the_steps():
    """Masks, means and factors are applied to all steps at once: a branch costs its two kernels in a forward pass."""
    shape = dict(TINY.shape)
    extra = {}
    for layers in (1, 3):
        workload = replace(TINY, shape=tuple({**shape, "num_hidden_layers": layers}.items()))
        model, ids = build(workload).to(DEVICE), batch(workload).to(DEVICE)
        with Ledger() as plain:
            model(input_ids=ids, use_cache=False)
        with ofa.fused_regularizers(model, estimator="hutchinson") as reg, Ledger() as measured:
            model(input_ids=ids, use_cache=False)
            reg.penalty()
        extra[layers] = measured.kernels - plain.kernels - 2 * 2 * layers
    assert extra[1] == extra[3]
