"""Tuned norms of half-precision models by the norm kernel: numbers, copies and restoring as for the norm itself.

Without a GPU, Triton's interpreter runs the kernels in float16, since it truncates bfloat16.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import ofa
from ofa.anatomy import fused_norms
from ofa.tuning import norms as tuning
from ofa_kernels import dispatch
from ofa_kernels.ops import launching
from tests import families
from tests.device import DEVICE
from tests.ofa.traces import EVERY

DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
SCALE = 2.0**-8
"""Loss scale, so that gradients of random models fit into float16."""
FAMILIES = ("llama", "gpt2", "gemma", "qwen3", "olmo2", "cohere")
"""RMSNorm, LayerNorm with a shift, 1 + w, norms on heads, norms after branches, LayerNorm without a shift."""
over_families = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(autouse=True)
def _on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, use the kernels for CPU tensors."""
    monkeypatch.delenv("OFA_KERNELS", raising=False)
    if DEVICE == "cpu":
        narrow = (torch.float16, torch.bfloat16)
        accepts = lambda tensor: tensor.device.type == "cpu" and tensor.dtype in narrow  # noqa: E731
        offered = dispatch._IMPLEMENTATIONS["normalize"]
        forced = [replace(one, accepts=accepts) if one.name == "triton" else one for one in offered]
        monkeypatch.setitem(dispatch._IMPLEMENTATIONS, "normalize", forced)


@pytest.fixture
def launched() -> Iterator[Counter[str]]:
    """Number of launches of each kernel."""
    counted: Counter[str] = Counter()

    def count(kernel: Any, grid: int, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        counted[kernel.fn.__name__] += 1
        launching._launch(kernel, grid, args, keywords)

    with launching.launching_by(count, launching.architecture(torch.device(DEVICE))):
        yield counted


def built(name: str, dtype: torch.dtype = torch.float16) -> nn.Module:
    """A tuned model that takes the interpreter seconds."""
    model = families.build(name).to(dtype)
    ofa.tune_norms(model)
    return model


def norms_of(model: nn.Module) -> list[Any]:
    return [model.get_submodule(norm.path) for norm in ofa.anatomy.steps.tuned_norms(model)]


def gradients(model: nn.Module, name: str, call: Any = None) -> tuple[Tensor, Tensor]:
    """Logits, and the loss' gradient in every scale, in one row."""
    output = (model if call is None else call)(**families.inputs(name, sequences=1, tokens=4))
    scales = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(output.loss.float() * SCALE, scales)
    return output.logits.detach(), torch.cat(found) / SCALE


def as_before(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Restore the norms' own forward pass."""
    monkeypatch.setattr(fused_norms, "takes", lambda module, hidden: False)
    return monkeypatch


@over_families
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_and_gradients_are_those_of_the_norms_themselves(
    name: str, dtype: torch.dtype, launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both round once after float32 arithmetic, and so differ only where a few roundings of 2⁻²⁴ cross a tie.

    That is at most 8 · 2⁻²⁴ / 2⁻¹¹ = 2⁻¹⁰ of the elements, and a thirtieth of the whole path's rounding. An eighth is
    allowed; one more rounding in each norm would be about half of it.
    """
    model = built(name, dtype)
    wide = families.build(name).to(dtype).float()
    ofa.tune_norms(wide)
    found = gradients(model, name)
    assert launched["norm_step_forward"] == launched["norm_step_backward"] == len(norms_of(model))
    as_before(monkeypatch)
    expected, exact = gradients(model, name), gradients(wide, name)
    assert launched["norm_step_forward"] == len(norms_of(model))
    assert found[0].dtype == expected[0].dtype == dtype
    for mine, own, true in zip(found, expected, exact, strict=True):
        assert (mine.float() - own.float()).norm() <= (own.float() - true).norm() / 8


@over_families
def test_restoring_undoes_everything(name: str) -> None:
    model = families.build(name).half()
    before = [(type(module), sorted(vars(module))) for module in model.modules()]
    ofa.tune_norms(model)
    assert all(fused_norms.takes(norm, norm.weight.detach().half()) for norm in norms_of(model))
    assert [type(module).__name__ for module in model.modules()] == [kind.__name__ for kind, _ in before]
    ofa.restore_norms(model)
    assert [(type(module), sorted(vars(module))) for module in model.modules()] == before


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_copies_compute_with_their_own_scales(how: Any, launched: Counter[str]) -> None:
    model = built("gpt2")
    expected = gradients(model, "gpt2")
    other = how(model)
    launched.clear()
    assert torch.equal(gradients(other, "gpt2")[0], expected[0])
    assert launched["norm_step_forward"] == len(norms_of(model))
    with torch.no_grad():
        norms_of(other)[-1].weight.zero_()
    assert torch.equal(gradients(model, "gpt2")[0], expected[0])
    assert not torch.equal(gradients(other, "gpt2")[0], expected[0])


def test_replicas_compute_with_their_own_scales() -> None:
    """As made by `nn.DataParallel` for the other devices."""
    norm = norms_of(built("llama"))[0]
    replica = norm._replicate_for_data_parallel()
    replica.weight = 2 * norm.weight.detach()
    hidden = torch.randn(3, 32).to(norm.weight).half()
    assert torch.equal(replica(hidden), 2 * norm(hidden))


def test_frozen_scales_of_an_adapter_are_fused_too(launched: Counter[str]) -> None:
    model = families.build("llama").half().requires_grad_(False)
    tuning.hold_norms(model)
    output = model(**families.inputs("llama", sequences=1, tokens=4)).logits
    assert not output.requires_grad
    assert launched == {"norm_step_forward": len(norms_of(model))}


def test_other_hooks_see_the_stream_in_the_models_dtype() -> None:
    norm, seen = norms_of(built("llama"))[0], []
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]), prepend=True)
    norm.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    hidden = torch.randn(3, 32).to(norm.weight).half()
    output = norm(hidden)
    assert seen[0] is hidden
    assert seen[2] is output
    assert output.dtype == torch.float16


def exchanged(norm: Any) -> None:
    """As accelerate's hooks do."""
    own = norm.forward
    norm.forward = lambda hidden: own(hidden)


def test_inputs_that_the_kernel_does_not_support_are_computed_by_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = norms_of(built("llama"))[0]
    hidden = torch.randn(3, 32).to(norm.weight).half()
    assert fused_norms.takes(norm, hidden)
    assert not any(fused_norms.takes(norm, hidden.to(wide)) for wide in (torch.float32, torch.float64))
    assert not fused_norms.takes(norm, hidden.to("meta"))
    with FakeTensorMode() as mode:
        assert not fused_norms.takes(norm, mode.from_tensor(hidden))
    with forward_ad.dual_level():
        assert not fused_norms.takes(norm, hidden)
    seen = []
    torch.func.vmap(lambda row: seen.append(fused_norms.takes(norm, row)) or row)(hidden)
    assert seen == [False]
    exchanged(norm)
    assert not fused_norms.takes(norm, hidden)
    assert not fused_norms.takes(norms_of(families.build("llama").half())[0], hidden)
    monkeypatch.setenv("OFA_KERNELS", "reference")
    assert not fused_norms.takes(norms_of(built("llama"))[0], hidden)


class GatedRMSNorm(nn.RMSNorm):
    """A norm with a second input."""

    def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        """The norm, times the gate if there is one."""
        return super().forward(hidden) * (1.0 if gate is None else gate)


@pytest.mark.parametrize("change", ["gated", "exchanged before", "exchanged afterwards"])
def test_norms_with_a_replaced_forward_pass_or_a_gate_are_not_fused(change: str, launched: Counter[str]) -> None:
    model = families.build("llama").half()
    norm: Any = model.model.norm
    if change == "gated":
        model.model.norm = norm = GatedRMSNorm(32, eps=1e-6, device=DEVICE, dtype=torch.float16)
    if change == "exchanged before":
        exchanged(norm)
    ofa.tune_norms(model)
    if change == "exchanged afterwards":
        exchanged(norm)
    hidden = torch.randn(3, 32).to(norm.weight).half()
    expected = norm.weight * nn.functional.rms_norm(hidden.float(), (32,), eps=1e-6)
    torch.testing.assert_close(norm(hidden), expected.half(), rtol=2**-10, atol=0)
    assert not launched
    assert norm(hidden).dtype == torch.float16
    ofa.restore_norms(model)
    assert norm(hidden).dtype == torch.float16
    assert not launched


def test_forward_mode_goes_through_the_norm_itself(launched: Counter[str]) -> None:
    """The norm's derivative along p, which is orthogonal to z, is γ p/σ."""
    norm = norms_of(built("llama"))[0]
    hidden = torch.randn(3, 32).to(norm.weight).half()
    z, along = hidden.float(), hidden.float().roll(1, -1)
    along = (along - z * (along * z).sum(-1, keepdim=True) / z.square().sum(-1, keepdim=True)).half()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(norm(forward_ad.make_dual(hidden, along))).tangent
    _, by_transform = torch.func.jvp(norm, (hidden,), (along,))
    expected = norm.weight * along.float() * torch.rsqrt(z.square().mean(-1, keepdim=True))
    for found in (tangent, by_transform):
        assert (found.float() - expected).norm() <= 4 * 2**-11 * expected.norm()
    assert not launched


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_second_derivatives_go_through_the_kernel(
    name: str, launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in guidance by a second backward pass; the tolerance is the float16 error of the unfused path."""
    model, wide = built(name), families.build(name).half().float()
    ofa.tune_norms(wide)

    def product(model: nn.Module) -> Tensor:
        model.set_attn_implementation("eager")
        loss = model(**families.inputs(name, sequences=1, tokens=4)).loss.float()
        scales = [parameter for parameter in model.parameters() if parameter.requires_grad]
        parts = torch.autograd.grad(loss * SCALE, scales, create_graph=True)
        inner = sum(part.sum() for part in parts)
        return torch.cat(torch.autograd.grad(inner, scales))

    found = product(model)
    assert launched["norm_step_forward"] == len(norms_of(model))
    as_before(monkeypatch)
    expected, exact = product(model), product(wide)
    assert (found - expected).norm() <= 2 * (expected - exact).norm()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients_bypass_the_kernel() -> None:
    """The rows of a Jacobian, γ/σ (I − ẑẑᵀ/d), within float16 rounding."""
    norm = norms_of(built("llama"))[0]
    hidden = torch.randn(32).to(norm.weight).half().requires_grad_()
    rows = torch.eye(32).to(hidden)
    (found,) = torch.autograd.grad(norm(hidden), hidden, rows, is_grads_batched=True, retain_graph=True)
    output = norm(hidden)
    by_vmap = torch.func.vmap(lambda row: torch.autograd.grad(output, hidden, row, retain_graph=True)[0])(rows)
    z = hidden.detach().float()
    rstd = torch.rsqrt(z.square().mean())
    expected = norm.weight.detach()[:, None] * rstd * (torch.eye(32).to(z) - rstd**2 * torch.outer(z, z) / 32)
    for jacobian in (found, by_vmap):
        assert (jacobian.float() - expected).norm() <= 4 * 2**-11 * expected.norm()


@pytest.mark.parametrize("kind", EVERY)
def test_regularizers_measure_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with norms on heads, inside the branches of every estimator."""

    def measured() -> tuple[Tensor, Tensor]:
        model: Any = built("qwen3")
        model.model.layers = model.model.layers[:1]
        scales = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with ofa.fused_regularizers(model, 1e-2, 1e-2, **EVERY[kind]) as reg:
            loss = model(**families.inputs("qwen3", sequences=1, tokens=4)).loss.float() + reg.penalty()
            found = torch.autograd.grad(SCALE * loss, scales)
        return loss.detach(), torch.cat(found)

    found = measured()
    as_before(monkeypatch)
    # Single roundings of float16, amplified as in tests/ofa/regularizers/test_precision.py.
    for mine, own in zip(found, measured(), strict=True):
        assert (mine - own).norm() <= 32 * 2**-11 * own.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_runs_the_same_norms_again(reentrant: bool, launched: Counter[str]) -> None:
    model: Any = built("llama")
    expected = gradients(model, "llama")
    launched.clear()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    output = model(**families.inputs("llama", sequences=1, tokens=4))
    (output.loss.float() * SCALE).backward()
    found = torch.cat([parameter.grad for parameter in model.parameters() if parameter.requires_grad]) / SCALE
    # A GPU's attention may sum gradients in another order.
    assert (found - expected[1]).norm() <= 4 * 2**-11 * expected[1].norm()
    assert launched["norm_step_forward"] > launched["norm_step_backward"] == len(norms_of(model))


def test_autocast_changes_nothing() -> None:
    norm = norms_of(built("llama"))[0]
    hidden = torch.randn(3, 32).to(norm.weight).half()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(norm(hidden), norm(hidden.clone()))
        assert norm(hidden).dtype == torch.float16


def test_a_compiled_model_is_one_graph_with_the_kernels_in_it() -> None:
    torch.compiler.reset()
    counters.clear()
    model: Any = built("llama")
    model.model.layers = model.model.layers[:1]
    expected, seen = gradients(model, "llama"), list[str]()

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.backends.debugging.aot_eager(graph, example)

    found = gradients(model, "llama", torch.compile(model, backend=backend))
    assert dict(counters["graph_break"]) == {}
    assert counters["stats"]["unique_graphs"] == 1
    assert sum("norm_step" in target for target in seen) == 3
    for mine, own in zip(found, expected, strict=True):
        assert (mine.float() - own.float()).norm() <= 4 * 2**-11 * own.float().norm()
    torch.compiler.reset()


def test_one_class_serves_norms_alike() -> None:
    kinds = {type(norm) for norm in norms_of(built("llama"))}
    assert len(kinds) == 1
    assert len(inspect.signature(kinds.pop().forward).parameters) == 2
