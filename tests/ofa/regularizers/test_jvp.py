"""The probes' estimate by forward-mode differentiation, against the steps and dense Jacobians of `tests.oracle`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import ofa
from ofa import InputError, anatomy
from ofa.commands import inspect
from ofa.regularizers.estimators import jvp
from tests import families, oracle
from tests.device import DEVICE
from tests.ofa.regularizers.test_hutchinson import DENSE
from tests.ofa.regularizers.test_recompute import gradients
from tests.ofa.traces import Failing, assert_gradient, own_token_trace, probes_of, spread, training_model

CLOSE = {"rtol": 1e-11, "atol": 1e-11}
"""Two orders of the same products in float64: some thousand roundings of 2⁻⁵³, and no ε that would magnify them."""

GRADIENTS = [(name, "sublayer") for name in ("llama", "gpt2", "gemma3", "olmo2", "phi", "bert", "falcon_two_norms")]
GRADIENTS += [(name, "layer") for name in ("llama", "gpt2", "bert", "opt_post_norm")]


def measuring(model: nn.Module, **options: Any) -> ofa.Regularizers:
    """Regularizers that measure the trace alone, by forward-mode differentiation."""
    return ofa.fused_regularizers(
        model, **{"step_ratio": 0.0, "sharpness": 1.0, "estimator": "jvp", "gradient": "full", **options}
    )


def measure(model: nn.Module, given: dict[str, Tensor], *, passes: int = 1, **options: Any) -> Tensor:
    """Measured traces h_t, (passes, steps, sequences)."""
    traces = []
    with measuring(model, **options) as reg, torch.no_grad(), reg.measuring():
        for _ in range(passes):
            model(**given)
            traces.append(reg.measurements.traces)
    return torch.stack(traces)


def switched_on() -> tuple[Any, ...]:
    """What of PyTorch's global state an estimator could leave behind: dual level, attention kernels, modes."""
    kernels = torch.backends.cuda
    flags = kernels.flash_sdp_enabled, kernels.mem_efficient_sdp_enabled, kernels.math_sdp_enabled
    modes = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    return (forward_ad._current_level, *modes, kernels.cudnn_sdp_enabled(), *(flag() for flag in flags))


@pytest.fixture(autouse=True)
def _nothing_stays_switched_on() -> Any:
    before = switched_on()
    yield
    assert switched_on() == before


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize(("name", "granularity"), oracle.CASES)
def test_the_estimate_is_the_quadratic_form_of_its_own_probes(name: str, granularity: str, samples: int) -> None:
    """Each family and granularity: h_t = −(1/n) mean νᵀ J_t P_t ν to rounding, with the ν that the Philox key gives."""
    with oracle.Float64():
        given, model = oracle.batch(name), oracle.model(name)
        measured = measure(model, given, granularity=granularity, samples=samples, seed=5)[0]
        steps = oracle.steps(name, model, given, granularity)
        expected = [
            torch.stack([step.quadratic(nu) for nu in probes_of(index, step.stream, seed=5, samples=samples)])
            for index, step in enumerate(steps)
        ]
    tokens = steps[0].stream.shape[1]
    torch.testing.assert_close(measured, -torch.stack(expected).mean(1) / tokens, **CLOSE)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
@pytest.mark.parametrize("name", DENSE)
def test_the_mean_over_many_probes_is_the_dense_trace(name: str, probe: str) -> None:
    """Unbiased: 400 probes of either law stay within 3 standard errors of −tr(J P)/n, whose size is known exactly."""
    samples = 400
    with oracle.Float64():
        given, model = oracle.batch(name, sequences=1), oracle.model(name)
        measured = measure(model, given, samples=samples, probe=probe, seed=1)[0, :, 0]
        for index, step in enumerate(oracle.steps(name, model, given, "sublayer")):
            dense = step.dense(0)
            error = float(measured[index]) + own_token_trace(dense)
            assert abs(error) <= 3 * spread(dense, probe, len(dense)) / math.sqrt(samples), index


@pytest.mark.parametrize("samples", [1, 8, 64])
def test_the_error_falls_with_the_square_root_of_the_probes(samples: int) -> None:
    """At a fixed budget N the error has the standard deviation σ/√N, σ from the dense Jacobian; no early stopping."""
    with oracle.Float64():
        given, model = oracle.batch("llama", sequences=1), oracle.model("llama")
        measured = measure(model, given, passes=20, samples=samples, seed=100 + samples)[..., 0]
        scores = []
        for index, step in enumerate(oracle.steps("llama", model, given, "sublayer")):
            dense = step.dense(0)
            errors = measured[:, index] + own_token_trace(dense)
            scores.append(errors * math.sqrt(samples) / spread(dense, "rademacher", len(dense)))
    squares = torch.stack(scores).square()
    # The mean of M squares with mean 1 deviates by √((κ − 1)/M); a quadratic form has κ ≤ 3 + 12/N (one direction).
    deviation = math.sqrt((2 + 12 / samples) / squares.numel())
    assert abs(float(squares.mean()) - 1) <= 3 * deviation


@pytest.mark.parametrize(("name", "granularity"), oracle.CASES)
def test_it_is_the_limit_of_the_finite_differences(name: str, granularity: str) -> None:
    """The same probes as `hutchinson`: its estimate for a small ε is this one, sample by sample."""
    with oracle.Float64():
        given, model, options = oracle.batch(name), oracle.model(name), {"granularity": granularity, "samples": 2}
        limit = measure(model, given, **options)
        difference = measure(model, given, **options, estimator="hutchinson", epsilon=1e-7)
    # Other probes would differ by some 10. A difference bends by ε = 10⁻⁷ times a curvature of up to 10⁴ (BERT's and
    # OPT's streams have σ < 1), and rounds by 2⁻⁵³/ε = 10⁻⁹ times updates of 10².
    torch.testing.assert_close(difference, limit, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(("name", "granularity"), GRADIENTS)
def test_the_penalty_has_the_gradient_of_its_differences(name: str, granularity: str, samples: int) -> None:
    """λ₁J + λ₂H along a direction in every γ, by autograd and by central differences with the same probes."""
    model, given = oracle.model(name), oracle.batch(name, sequences=1)
    with oracle.Float64(), measuring(model, step_ratio=0.7, granularity=granularity, samples=samples) as reg:
        assert_gradient(model, given, reg)


class Normed(nn.Module):
    """An MLP behind one of PyTorch's own norms."""

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(self.norm(hidden))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_inside_a_branch_have_the_right_gradient(norm: type[nn.Module], affine: bool) -> None:
    """PyTorch takes 1/σ for a constant when it differentiates these tangents; the estimator must not."""
    model, given = families.build("llama").double(), oracle.batch("llama", sequences=1)
    for layer in model.model.layers:
        layer.mlp = Normed(norm(32, elementwise_affine=affine, eps=0.1, dtype=torch.float64, device=DEVICE), layer.mlp)
    with oracle.Float64(), measuring(model) as reg:
        assert_gradient(model, given, reg)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "olmo2", "bert"])
def test_attention_has_a_part_in_the_gradient(name: str, implementation: str) -> None:
    """The trace of each attention step depends on the γ of that step: tangents without a graph would be no use."""
    model, given = families.build(name).double(), oracle.batch(name, sequences=1)
    model.set_attn_implementation(implementation)
    with measuring(model) as reg:
        model(**given)
        traces = reg.measurements.traces
        for index, step in enumerate(reg.steps):
            if step.branches[0].role == "attention":
                scale = model.get_submodule(step.branches[0].norm.path).weight
                (gradient,) = torch.autograd.grad(traces[index].sum(), scale, retain_graph=True)
                assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon_alibi", "bert"])
def test_attention_implementations_agree(name: str) -> None:
    """Eager attention takes other arguments, and goes another way to the same tangents."""
    measured = []
    for implementation in ("eager", "sdpa"):
        model = families.build(name).double()
        model.set_attn_implementation(implementation)
        with oracle.Float64():
            measured.append(measure(model, oracle.batch(name), samples=2))
    torch.testing.assert_close(*measured, **CLOSE)


def padded(side: str) -> dict[str, Tensor]:
    """Two sequences, the second with two tokens of padding."""
    given = oracle.batch("llama")
    mask = torch.ones_like(given["input_ids"])
    mask[1, slice(3, None) if side == "right" else slice(None, 2)] = 0
    return {**given, "attention_mask": mask}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("samples", [1, 3])
def test_padding_enters_neither_the_trace_nor_its_mean(side: str, samples: int) -> None:
    """With an attention mask the trace is the sum over the real tokens' own probes, divided by their number."""
    with oracle.Float64():
        given, model = padded(side), oracle.model("llama")
        mask = given["attention_mask"]
        measured = measure(model, given, samples=samples)[0]
        for index, step in enumerate(oracle.steps("llama", model, given, "sublayer")):
            real = dataclasses.replace(step, left=step.left * mask)
            each = [real.quadratic(nu) for nu in probes_of(index, step.stream, samples=samples)]
            torch.testing.assert_close(measured[index], -torch.stack(each).mean(0) / mask.sum(1), **CLOSE)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_gradient_is_finite_with_padding(side: str, implementation: str) -> None:
    """Fully masked rows must not put NaN into the gradient of γ, nor a part of it."""
    model = families.build("llama").double()
    model.set_attn_implementation(implementation)
    with oracle.Float64(), measuring(model) as reg:
        assert_gradient(model, padded(side), reg)


@pytest.mark.parametrize("samples", [1, 3])
def test_one_probe_needs_no_copies(samples: int) -> None:
    """Branches see N times the batch, so that a single probe leaves it as it is; what follows them sees it once."""
    model, seen = families.build("llama"), []
    layer = model.model.layers[0]
    with measuring(model, samples=samples) as reg:
        assert reg.estimator == "jvp"
        for module in (layer.self_attn.o_proj, layer.post_attention_layernorm, layer.mlp.down_proj):
            module.register_forward_hook(lambda module, args, output: seen.append(len(output)))
        model(**families.inputs("llama"))
    assert seen == [2 * samples, 2, 2 * samples]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon", "opt", "bert", "vit"])
@pytest.mark.parametrize("granularity", ["sublayer", "layer"])
def test_the_model_computes_what_it_did(name: str, granularity: str) -> None:
    """Measured in float32: outputs and gradients of the loss up to rounding; closed: the same bits, and no hooks."""
    model, given = families.build(name), families.inputs(name)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    plain = model(**given)
    slopes = gradients(model, plain.loss)
    with measuring(model, granularity=granularity, samples=2) as reg:
        measured = model(**given)
        assert reg.measurements.traces.isfinite().all()
    # Attention takes another path, with other sums of float32: 2⁻²⁴ each, through three layers.
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(measured.logits, plain.logits, **close)
    for one, other in zip(gradients(model, measured.loss), slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert torch.equal(model(**given).logits, plain.logits)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    reg.close()


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2", "bert"])
def test_bfloat16_measures_the_trace_of_float32(name: str) -> None:
    """No ε magnifies the roundings of bfloat16: its traces are the float32 ones up to a twentieth, probe by probe."""
    given, measured = families.inputs(name), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = families.build(name)
        model.get_input_embeddings().weight.data /= 0.15  # σ ≈ 1, as in trained models behind the first layers
        measured[dtype] = measure(model.to(dtype), given, samples=4)
    assert measured[torch.bfloat16].dtype == torch.float32
    # 2⁻⁹ for each of the dozen roundings between a stream and its branch's end, and for those of all steps before.
    error = (measured[torch.bfloat16] - measured[torch.float32]).norm()
    assert error <= 0.05 * measured[torch.float32].norm()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("llama", "model.layers.1.self_attn.v_proj"),
        ("llama", "model.layers.1.mlp.down_proj"),
        ("llama", "lm_head"),
        ("gemma3", "model.layers.1.mlp.down_proj"),
        ("opt", "model.decoder.layers.1.activation_fn"),
        ("bert", "bert.encoder.layer.1.intermediate.dense"),
        ("bert", "bert.encoder.layer.1.output.dense"),
    ],
)
def test_an_exception_in_a_branch_leaves_nothing_behind(name: str, path: str) -> None:
    """The model fails in the middle of a branch: PyTorch is as before at once, and the next pass measures again."""
    model, given, before = families.build(name), families.inputs(name), switched_on()
    failing = Failing(model.get_submodule(path))
    with measuring(model) as reg:
        model(**given)
        whole = reg.measurements.traces
        model.set_submodule(path, failing)
        with pytest.raises(OSError, match="device lost"):
            model(**given)
        assert switched_on() == before
        with pytest.raises(RuntimeError, match="no forward pass has been measured"):
            reg.penalty()
        reg.passes = 0
        model(**given)
        assert switched_on() == before
        assert torch.equal(reg.measurements.traces, whole)


def test_an_interrupt_is_cleared_up_by_closing() -> None:
    """What no hook is told of, such as the interrupt key, is over with `close()` at the latest."""
    model, before = families.build("llama"), switched_on()

    def interrupt(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(interrupt)
    with measuring(model), pytest.raises(KeyboardInterrupt):
        model(**families.inputs("llama"))
    assert switched_on() == before


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "falcon_two_norms", "olmo2", "bert"])
def test_checkpointing_changes_neither_loss_nor_gradient(name: str, samples: int) -> None:
    """Two passes, then both backwards: layers that are run again carry the tangents of their own pass."""
    results = []
    for checkpointing in (False, True):
        model, losses = training_model(name, checkpointing=checkpointing), []
        with measuring(model, step_ratio=1.0, samples=samples, into_loss=True):
            losses += [model(**oracle.batch(name, seed=seed)).loss for seed in (0, 1)]
            results.append([part for loss in losses for part in (loss.detach(), *gradients(model, loss))])
    for one, other in zip(*results, strict=True):
        # The recomputation does the same operations in the same order; only sums of gradients may change their order.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_checkpointed_layers_are_refused_as_steps() -> None:
    """A layer is run again without its hooks, so that its second run has no tangents; measuring alone is no problem."""
    model, given = training_model("llama", checkpointing=True), oracle.batch("llama")
    with measuring(model, granularity="layer") as reg:
        with pytest.raises(InputError, match="use granularity='sublayer', or another estimator"):
            model(**given)
        with torch.no_grad(), reg.measuring():
            model(**given)
        model.eval()
        model(**given)
        reg.penalty().backward()


def test_an_exception_in_the_second_run_leaves_nothing_behind() -> None:
    """A checkpointed layer fails in the backward pass, where the model's own hook is told nothing."""
    model, before = training_model("llama", checkpointing=True), switched_on()
    mlp = model.model.layers[1].mlp
    mlp.down_proj = Failing(mlp.down_proj, number=2)
    with measuring(model) as reg:
        model(**oracle.batch("llama"))
        with pytest.raises(OSError, match="device lost"):
            reg.penalty().backward()
        assert switched_on() == before


# On a GPU not flash attention alone: it has no float32, and layers outside of branches attend as ever.
@pytest.mark.parametrize("choice", [(True, False, DEVICE == "cuda"), (False, True, True)])
def test_attention_kernels_are_left_as_they_were(choice: tuple[bool, bool, bool]) -> None:
    """Whatever kernels the caller has chosen for scaled_dot_product_attention: branches need none of them."""
    kernels = torch.backends.cuda
    switches = kernels.enable_flash_sdp, kernels.enable_mem_efficient_sdp, kernels.enable_math_sdp
    before = switched_on()[-3:]
    model, given, seen = families.build("llama"), families.inputs("llama"), []
    expected = measure(model, given)
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda *_: seen.append(switched_on()))
    try:
        for switch, value in zip(switches, choice, strict=True):
            switch(value)
        assert torch.equal(measure(model, given), expected)
        assert seen[-1][0] == 0
        assert seen[-1][-3:] == switched_on()[-3:] == choice
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch(value)


DRAWN = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
HEADS = [torch.randn(2, heads, 5, 8, **DRAWN).to(DEVICE) for heads in (4, 2, 2)]
ALL_HEADS = [HEADS[0], *(heads.repeat_interleave(2, 1) for heads in HEADS[1:])]
ATTENDS = torch.tensor([[False] * 5, *[[True] * 3 + [False] * 2] * 4], device=DEVICE)
SCALE, SHIFT = torch.randn(2, 8, **DRAWN).to(DEVICE)


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.scaled_dot_product_attention(*ALL_HEADS),
        lambda: F.scaled_dot_product_attention(*ALL_HEADS, is_causal=True, scale=0.1),
        lambda: F.scaled_dot_product_attention(*ALL_HEADS, ATTENDS),
        lambda: F.scaled_dot_product_attention(*ALL_HEADS, attn_mask=torch.where(ATTENDS, 0.5, -math.inf).double()),
        lambda: F.scaled_dot_product_attention(*HEADS, is_causal=True, enable_gqa=True),
        lambda: F.softmax(HEADS[0], dim=-1),
        lambda: F.softmax(HEADS[0], 1, dtype=torch.float32),
        lambda: torch.softmax(HEADS[0].float(), 2, torch.float64),
        lambda: HEADS[0].softmax(-1, torch.float32),
        lambda: F.layer_norm(HEADS[0], (8,), SCALE, SHIFT, 0.1),
        lambda: F.layer_norm(HEADS[0], [5, 8], bias=torch.stack([SHIFT] * 5)),
        lambda: torch.layer_norm(HEADS[0], (8,)),
        lambda: F.rms_norm(HEADS[0], (8,), SCALE),
        lambda: torch.rms_norm(HEADS[0], (5, 8), eps=0.1),
    ],
)
def test_what_is_written_out_computes_the_same(call: Callable[[], Tensor]) -> None:
    """Attention, softmax and norms from plain operations: PyTorch's own values, in whatever way they are called."""
    with jvp._WrittenOut():
        written = call()
    own = call()
    # Another order of a dozen operations, in float32 where that is asked for.
    torch.testing.assert_close(written, own, rtol=8 * torch.finfo(own.dtype).eps, atol=8 * torch.finfo(own.dtype).eps)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_without_forward_mode_is_refused(implementation: str) -> None:
    """In one sentence with the ways out, before anything runs; the model can be told otherwise at any time."""
    model, given = families.build("llama"), families.inputs("llama")
    with measuring(model) as reg:
        model.config._attn_implementation = implementation
        with pytest.raises(InputError, match=r"attn_implementation='sdpa' or 'eager', or another") as error:
            model(**given)
        assert repr(implementation) in str(error.value)
        model.config._attn_implementation = "sdpa"
        model(**given)
        assert reg.measurements.traces.isfinite().all()


@pytest.mark.parametrize("compiled", ["", "model.layers.1.mlp"])
def test_compiled_branches_are_refused(compiled: str) -> None:
    """A branch inside `torch.compile` would lose tangents, or part of them and be measured wrong."""
    model = families.build("llama")
    model.get_submodule(compiled).compile(backend="eager")
    with measuring(model), pytest.raises(InputError, match=r"inside torch\.compile"):
        model(**families.inputs("llama"))
    torch._dynamo.reset()


def test_what_is_compiled_inside_a_branch_runs_uncompiled() -> None:
    """The trace is that without `torch.compile`, and outside of measured branches it is at work."""
    model, given, compiled = families.build("llama"), families.inputs("llama"), []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    expected = measure(model, given)
    for layer in model.model.layers:
        layer.mlp.act_fn.compile(backend=backend)
    with measuring(model) as reg, torch.no_grad():
        compiled.clear()  # what attaching has tried out
        torch._dynamo.reset()
        with reg.measuring():
            model(**given)
        assert torch.equal(reg.measurements.traces, expected[0])
        assert not compiled
        model(**given)
    assert compiled
    torch._dynamo.reset()


def test_dropout_is_refused() -> None:
    """As it is for finite differences: another mask in every pass would be another branch."""
    model = families.build("gpt2").train()
    with measuring(model), pytest.raises(InputError, match="dropout is active"):
        model(**families.inputs("gpt2"))


def test_inference_mode_is_refused() -> None:
    """PyTorch drops tangents there without a word, and every trace would be 0."""
    model = families.build("llama")
    with (
        measuring(model) as reg,
        torch.inference_mode(),
        reg.measuring(),
        pytest.raises(InputError, match=r"use torch\.no_grad\(\)"),
    ):
        model(**families.inputs("llama"))


def test_a_branch_that_loses_its_tangent_is_refused() -> None:
    """Whatever leaves PyTorch on the way has no tangent, which is not a trace of 0."""

    class Foreign(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return torch.from_numpy(hidden.detach().cpu().numpy() ** 2).to(DEVICE)

    model = families.build("llama")
    model.model.layers[1].mlp = Foreign()
    with measuring(model), pytest.raises(InputError, match=r"model\.layers\.1\.mlp returns nothing"):
        model(**families.inputs("llama"))


@pytest.mark.parametrize(
    ("name", "remark"),
    [
        ("llama", "with sdpa or eager attention"),
        (
            "opt_post_norm",
            "only with --granularity layer: the norm stands behind the sum; with sdpa or eager attention",
        ),
    ],
)
def test_inspect_knows_it(name: str, remark: str) -> None:
    """`ofa inspect` lists the estimator with what it needs."""
    model = families.build(name)
    listed = inspect.describe(model, anatomy.find(model), name)["estimators"]
    assert {"name": "jvp", "applies": True, "remark": remark} in listed
